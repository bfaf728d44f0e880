"""The interface of a strategy: it plans a round, weights the sum, and learns from the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor
from typing_extensions import TypeVar

from fedlq_ray.config.schemes import Scoped, StrategyConfig
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.models import Layer
from fedlq_ray.quantization import (
    LAYER_HEADER,
    PAYLOAD_HEADER,
    Absent,
    Family,
    Float16,
    Float32,
    MinMax,
    Quantizer,
    Segment,
)
from fedlq_ray.significance import Measurement
from fedlq_ray.training.local import Plan
from fedlq_ray.training.payloads import Feedback


@dataclass(frozen=True)
class Member:
    """What a strategy knows about a client of the cohort: mean conditions, never those drawn for a round.

    Args:
        samples: that it trains on per pass.
        fixed_s: seconds of download (where billed), compute and latency: everything but the upload's bytes.
        uplink_bytes_per_s: float("inf") where uploads are free.
        work: its samples as a multiple of those it must train on (`train.adaptive_work`); fixed_s includes it.
        updates: if it is planned alone, because no step waits for all clients: how many updates make a step. None: the
            cohort makes it.
        server_lr: factor of the server's step along the mean update.
    """

    client: int
    samples: int
    fixed_s: float
    uplink_bytes_per_s: float
    work: float = 1.0
    updates: int | None = None
    server_lr: float = 1.0


Chosen = TypeVar("Chosen", bound=StrategyConfig, default=Any, covariant=True)


@dataclass(frozen=True)
class StrategyContext(Generic[Chosen]):
    """What a strategy is built from: configuration, layers of the flat vector, seed, quantizer by level, and whether
    clients keep what quantization loses."""

    config: Chosen
    layers: tuple[Layer, ...]
    seed: int
    quantizer: Family = MinMax
    error_feedback: Feedback = False

    def quantizer_at(self, bits: int) -> Quantizer:
        """The quantizer of a level: 32 and 16 are float32 and float16, and 0 sends nothing."""
        if bits == 0:
            return Absent()
        if bits == 32:
            return Float32()
        return Float16() if bits == 16 else self.quantizer(bits)

    def plan(self, quantizers: Sequence[Quantizer]) -> Plan:
        """A plan with one quantizer for each layer that is not a buffer; buffers are sent as float32."""
        return Plan(self.config.payload, self.segments(quantizers), self.error_feedback)

    def segments(self, quantizers: Sequence[Quantizer]) -> tuple[Segment, ...]:
        """The pieces of a plan: one segment per layer."""
        chosen = iter(quantizers)
        return tuple(
            Segment(Float32() if layer.buffer else next(chosen), layer.start, layer.stop) for layer in self.layers
        )

    def one(self, quantizer: Quantizer) -> tuple[Segment, ...]:
        """The pieces of a one-quantizer plan: one segment per layer, or (`strategy.scope=model`) one in all."""
        layers = self.quantized
        segments = self.segments([quantizer] * len(layers))
        if not isinstance(self.config, Scoped) or self.config.scope == "layer":
            return segments
        return (Segment(quantizer, layers[0].start, layers[-1].stop), *segments[len(layers) :])

    def at_levels(self, levels: Sequence[int]) -> Plan:
        """A plan with one level for each layer that is not a buffer."""
        return self.plan([self.quantizer_at(bits) for bits in levels])

    @property
    def quantized(self) -> tuple[Layer, ...]:
        """The layers that may be quantized: all but buffers."""
        return tuple(layer for layer in self.layers if not layer.buffer)

    def size(self, layer: Layer, bits: int) -> int:
        """Bytes of a layer on the wire at a level, its header included.

        Raises:
            ConfigError: the quantizer's size depends on the values.
        """
        size = self.quantizer_at(bits).size(layer.size)
        if size is None:
            raise ConfigError(f"strategy.quantizer: {self.config.name} plans bytes, but this one's size varies")
        return LAYER_HEADER + size

    @property
    def fixed_size(self) -> int:
        """Bytes of a payload that do not depend on levels: its header and buffers."""
        return PAYLOAD_HEADER + sum(self.size(layer, 32) for layer in self.layers if layer.buffer)


def by_samples(cohort: Sequence[Member]) -> list[float]:
    """The members' shares of the average when no plan has a weight: by samples per pass."""
    total = sum(member.samples for member in cohort)
    return [member.samples / total for member in cohort]


@dataclass(frozen=True)
class Probe:
    """A measurement that a strategy requests, on the weights that enter a round.

    It runs while that round trains; `RoundResult` has the result after the round.

    Args:
        quantizers: tried on each layer alone, such as those of the levels to choose from.
        samples: maximum number of held-out samples to measure on.
        metric: a name in `significance.METRICS`.
        clients: whose samples are used; None: all clients'. The rounds set it (`strategy.probe_on`).
    """

    quantizers: tuple[Quantizer, ...]
    samples: int
    metric: str
    clients: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RoundResult:
    """The result of a round, from which a strategy learns.

    Args:
        measurement: what `probe` requested, if anything.
        update: the cohort's mean update (d,) float32, as returned by `combine`; the server may take another step.
        weights: the model (d,) float32 that entered the round.
        train_loss: the mean of the clients' training losses; None if no client replied.
        round_time_s: simulated seconds that the round took.
        noise: the squared errors of the clients' payloads, over the squares of their updates, both weighted by p_n^2;
            None if no client replied. A client knows both, and would send 8 more bytes, which are not billed.
        payload_bytes: mean size of the clients' payloads; None if no client replied.
    """

    measurement: Measurement | None
    update: Tensor
    weights: Tensor
    train_loss: float | None
    round_time_s: float
    noise: float | None = None
    payload_bytes: float | None = None


State = TypeVar("State", default=Any)


class Strategy(Generic[State]):
    """A strategy. Your own needs `plan`; the other methods have these defaults.

    The state is what changes between rounds: `init` makes it, `learn` returns the next one, and the rounds pass it to
    the methods. It is a plain value: a number, text, a tensor, an array, a list or dict of these, or a frozen dataclass
    with such fields. Checkpoints store it. Attributes are constants.
    """

    error_feedback: Feedback = False  # what `strategy.error_feedback=null` means
    timeless = False  # uses neither fixed_s nor uplink_bytes_per_s nor round_time_s; your own class must declare it

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_made"):
            raise FedLQError(
                f"{type(self).__name__} changes its attribute {name} during a run, which a resumed run would not have; "
                "make it part of the state that `learn` returns"
            )
        super().__setattr__(name, value)

    def init(self) -> State:
        """The state before the first round."""
        return None  # type: ignore[return-value]  # a strategy without state is a Strategy[None]

    def plan(self, state: State, round: int, cohort: Sequence[Member]) -> Mapping[int, Plan]:
        """Each member's plan for a round, by client. Clients without a plan skip the round and do not delay it."""
        raise TypeError(f"{type(self).__name__} has no plan")

    def expected_bytes(self, state: State, round: int, cohort: Sequence[Member]) -> Sequence[float] | None:
        """Bytes that each member reserves upload time for when it trains as long as it can (`train.adaptive_work`).
        None: the mean payload of the previous round."""
        return None

    def combine(self, state: State, update: Tensor) -> Tensor:
        """What the server uses as the cohort's mean update (d,); by default, that update."""
        return update

    def probe(self, state: State, round: int) -> Probe | None:
        """What to measure while this round trains."""
        return None

    def learn(self, state: State, round: int, result: RoundResult) -> State:
        """The state after a round."""
        return state

    def report(self, state: State) -> dict[str, Any]:
        """What to log with a round, such as significance by layer: plain values by name."""
        return {}
