"""What a strategy is: a plan before a round, the weights of the sum, and what it learns afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedlq_ray.config import StrategyConfig
from fedlq_ray.models import Layer
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER, QUANTIZERS, Quantizer
from fedlq_ray.quantization.wire import Segment
from fedlq_ray.significance import Measurement
from fedlq_ray.training import Plan


@dataclass(frozen=True)
class Member:
    """What a strategy knows of a client of the cohort: means, never a round's drawn conditions.

    Args:
        samples: that it trains on in a pass.
        fixed_s: seconds of download (where billed), compute and latency: all but the upload's bytes.
        uplink_bytes_per_s: float("inf") where uploads are free.
    """

    client: int
    samples: int
    fixed_s: float
    uplink_bytes_per_s: float


@dataclass(frozen=True)
class Setting:
    """What a strategy is made from: its configuration, the layers of the flat vector, the quantizer, the seed."""

    config: StrategyConfig
    layers: tuple[Layer, ...]
    seed: int
    quantizer_name: str = "minmax"
    quantizer: Quantizer | None = None

    def quantizer_at(self, bits: int) -> tuple[str, Quantizer]:
        """The quantizer of a level: 32 and 16 are float32 and float16."""
        name = {32: "float32", 16: "float16"}.get(bits, self.quantizer_name)
        return name, QUANTIZERS[name] if name != "custom" else self.quantizer  # type: ignore[return-value]

    def plan(self, levels: Sequence[int]) -> Plan:
        """A plan with one level for each layer that is not a buffer; buffers go as float32."""
        chosen = iter(levels)
        segments = []
        for layer in self.layers:
            bits = 32 if layer.buffer else next(chosen)
            segments.append(Segment(self.quantizer_at(bits)[0], bits, layer.start, layer.stop))
        return Plan(self.config.payload, tuple(segments), self.config.error_feedback)

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """The layers that may be quantized: all but buffers."""
        return tuple(layer for layer in self.layers if not layer.buffer)

    def size(self, layer: Layer, bits: int) -> int:
        """Bytes of a layer on the wire at a level, its header included."""
        return LAYER_HEADER + self.quantizer_at(bits)[1].size(layer.size, bits)

    @property
    def fixed_size(self) -> int:
        """Bytes of a payload that no level changes: its header, and buffers."""
        return PAYLOAD_HEADER + sum(self.size(layer, 32) for layer in self.layers if layer.buffer)


@dataclass(frozen=True)
class Probe:
    """A measurement that a strategy asks for: levels for each layer, made of the weights that enter a round.

    It runs while that round trains; the strategy hears of it when the round is over.
    """

    levels: tuple[int, ...]
    samples: int


class Strategy:
    """A plan and nothing else. A user's own needs `plan`; the rest has these defaults.

    All that changes from round to round is in attributes, which pickle.
    """

    needs_evaluation = False  # plans from `evaluation`: the driver then waits for it before each plan

    def plan(self, round: int, cohort: Sequence[Member], evaluation: Any = None) -> Mapping[int, Plan]:
        """Each member's plan for a round, by client."""
        raise TypeError(f"{type(self).__name__} has no plan")

    def weights(self, cohort: Sequence[Member]) -> Sequence[float]:
        """The members' shares of the average: by samples, as FedAvg has it."""
        total = sum(member.samples for member in cohort)
        return [member.samples / total for member in cohort]

    def probe(self, round: int) -> Probe | None:
        """What to measure while this round trains."""
        return None

    def learn(self, round: int, measurement: Measurement | None, update: Tensor) -> None:
        """What came of the round: the measurement that was asked for, and the cohort's mean update (d,)."""

    def report(self) -> dict[str, Any]:
        """What to log with a round, such as significance by layer; plain numbers."""
        return {}
