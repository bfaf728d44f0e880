"""Schemes with one quantizer for every client and round, each with its paper's usual settings.

By default each layer is quantized on its own. `strategy.scope=model` treats the whole vector as one layer, as in many
of the papers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedlq_ray.config.schemes import ScopedRated
from fedlq_ray.errors import ConfigError
from fedlq_ray.quantization import Eden, Float16, QsgdElias, Quantizer, Sign, Stc, TernGrad, TopK
from fedlq_ray.strategies.base import Member, Strategy, StrategyContext
from fedlq_ray.training.local import Plan


class Fixed(Strategy):
    """The same quantizer for all."""

    timeless = True

    def __init__(self, context: StrategyContext, quantizer: Quantizer) -> None:
        segments = context.one(quantizer)
        self._plan = Plan(context.config.payload, segments, context.error_feedback)

    def plan(self, state: None, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        return {member.client: self._plan for member in cohort}


class HalfPrecision(Fixed):
    """FedAvg with float16 on the wire."""

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context, Float16())


class QsgdFixed(Fixed):
    """QSGD (Alistarh et al., NeurIPS 2017) on the update after local steps, in the form used by its authors: buckets
    of 512, with the largest magnitude as norm."""

    def __init__(
        self, context: StrategyContext, levels: int = 7, bucket: int | None = 512, norm: Literal["l2", "max"] = "max"
    ) -> None:
        super().__init__(context, QsgdElias(levels, bucket, norm))


class FedPAQ(Fixed):
    """FedPAQ (Reisizadeh et al., AISTATS 2020, arXiv:1909.13014): QSGD of the update after local steps, with the
    Euclidean norm of each layer, or of the whole vector, as in the paper, with `strategy.scope=model`."""

    def __init__(self, context: StrategyContext, levels: int = 7) -> None:
        super().__init__(context, QsgdElias(levels, None, "l2"))


class TernGradFixed(Fixed):
    """TernGrad (Wen et al., NeurIPS 2017, arXiv:1705.07878): clipped at 2.5 deviations, one scale per layer."""

    def __init__(self, context: StrategyContext, clip: float | None = 2.5) -> None:
        super().__init__(context, TernGrad(clip))


class SignSGD(Fixed):
    """signSGD with majority vote (Bernstein et al., ICML 2018, arXiv:1802.04434), on the update after local steps.

    Every client has one vote per sign. The server steps by `step` along the majority, and does not move on a tie.
    """

    def __init__(self, context: StrategyContext, step: float = 1e-3) -> None:
        if context.config.payload == "model":
            raise ConfigError("strategy.payload: signsgd votes on updates, not on models")
        if context.error_feedback:
            raise ConfigError(
                "strategy.error_feedback: signsgd sends votes of +-1, and memories would grow to their size; use "
                "false, or strategy.name=ef_signsgd"
            )
        super().__init__(context, Sign(scaled=False))
        self._plan = replace(self._plan, weight=1.0)
        self.step, self.voted = step, [(layer.start, layer.stop) for layer in context.quantized]

    def combine(self, state: None, update: Tensor) -> Tensor:
        stepped = update.clone()
        for start, stop in self.voted:
            # Votes are multiples of 1 / cohort: smaller values are ties with rounding errors.
            votes = torch.where(update[start:stop].abs() < 1e-6, 0.0, update[start:stop])
            stepped[start:stop] = self.step * torch.sign(votes)
        return stepped


class EfSignSGD(Fixed):
    """EF-signSGD (Karimireddy et al., ICML 2019, arXiv:1901.09847): sign and mean magnitude, with error feedback."""

    error_feedback = True

    def __init__(self, context: StrategyContext) -> None:
        super().__init__(context, Sign())


class TopKFixed(Fixed):
    """Top-k with error feedback (Stich et al., NeurIPS 2018, arXiv:1809.07599)."""

    error_feedback = True

    def __init__(self, context: StrategyContext, fraction: float = 0.01) -> None:
        super().__init__(context, TopK(fraction))


class StcFixed(Fixed):
    """Sparse ternary compression (Sattler et al., IEEE TNNLS 2020, arXiv:1903.02891), upstream half."""

    error_feedback = True

    def __init__(self, context: StrategyContext, fraction: float = 0.01) -> None:
        super().__init__(context, Stc(fraction))


class EdenFixed(Fixed):
    """EDEN (Vargaftik et al., ICML 2022, arXiv:2108.08842) at `strategy.bits`, fractions included.

    With error feedback the scale is the one of least error, so that the memory contracts; without, the unbiased one.
    """

    error_feedback = True

    def __init__(self, context: StrategyContext[ScopedRated]) -> None:
        super().__init__(context, Eden(context.config.bits, unbiased=not context.error_feedback))
