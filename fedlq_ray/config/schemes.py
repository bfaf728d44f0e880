"""The settings of each strategy: `SCHEMES` has one class per name, with the settings that the strategy reads.

They are separate from the strategies, so that settings are checked and shown without loading PyTorch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from fedlq_ray.config.parts import unknown
from fedlq_ray.config.sections import Args, Section, Text, key

Positive = Annotated[float, Field(gt=0)]
Level = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
BITS = "bits per parameter"


def own(default: Any, meaning: str, **bounds: Any) -> Any:
    """A setting of one strategy only; its name may mean something else for another strategy."""
    return key(default, meaning, own=True, **bounds)


class StrategyConfig(Section):
    """Settings that every strategy reads.

    Attributes:
        not_stale: why the strategy cannot take updates of several versions in a step; empty: it can.
    """

    not_stale: ClassVar[str] = ""
    name: Text = key("fedlq", "a scheme by name (docs/algorithms lists them), or your own as module:function")
    payload: Literal["update", "model"] = key("update", "what a client sends: its update, or its whole model")
    error_feedback: bool | Literal["ef21", "cafe"] | None = key(
        None,
        "clients add what quantization lost in a round to what they send in the next; ef21: they send the difference "
        "from the server's vector of them; cafe: the difference from the last mean update; null: the strategy's own "
        "default; signsgd and fedluar allow none",
    )

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in SCHEMES and ":" not in name:
            raise ValueError(unknown(name, SCHEMES))
        if SCHEMES.get(name, Every) is not cls:
            raise ValueError(f"{name} has settings of its own; give them as a dict: strategy={{'name': {name!r}}}")
        return name


class Quantized(StrategyConfig):
    """The settings name the quantizer that sends levels."""

    quantizer: Text = key(
        "minmax",
        "minmax, qsgd, eden (rotated), clipped (to nearest over a clipped range, for error feedback), or your own as "
        "module:attribute",
    )


class Scoped(StrategyConfig):
    """One quantizer for all layers."""

    scope: Literal["layer", "model"] = key("layer", "what the quantizer encodes at once: a layer, or the whole model")


class Rated(StrategyConfig):
    """One rate for all clients."""

    bits: float = key(
        4.0, "rate of a client's payload; uniform: the level; a fraction mixes two levels over clients",
        unit=BITS, gt=0, le=32,
    )  # fmt: skip


class Budgeted(Rated):
    """A budget in bytes for each client."""

    budget: Literal["bits", "deadline", "cohort"] = key(
        "cohort",
        "bytes for each client from `bits`, from a fixed deadline_s, or from the cohort: the slowest member at "
        "floor_bits sets the time that the others may fill",
    )
    floor_bits: float | None = key(
        None, "budget=cohort: rate of the slowest member, but at least the lowest level; null: the best rate by the "
        "convergence bound, per round. fedlq_rd, budget=deadline: a client that cannot send at this rate in time is "
        "late; null: at 0.02",
        unit=BITS, gt=0, le=32,
    )  # fmt: skip
    noise_cost: float = key(
        0.004,
        "floor_bits=null: how much a squared error of the average, over an update's square, adds to the time "
        "and bytes that training takes, for each round so far",
        ge=0,
    )
    thrift: float = key(
        0.25,
        "floor_bits=null: bytes are worth as much as this power of time: twice the bytes must shorten the time "
        "by a factor of 2^thrift",
        ge=0,
    )
    cap_bits: float | None = key(
        None, "maximum rate of a client, since more bits do not help; null: 2 for updates (fedlq_rd: 1), or the "
        "highest level if all are above 2; 8 for models; at least floor_bits",
        unit=BITS, gt=0, le=32,
    )  # fmt: skip
    deadline_s: Positive | None = key(None, "budget=deadline: simulated length of a round", unit="s")
    enough_bits: ClassVar[float] = 2.0  # for an update: docs/decisions/0034

    @property
    def cap(self) -> float:
        """The maximum rate of a client, bits per parameter."""
        if self.cap_bits is not None:
            return self.cap_bits
        levels = getattr(self, "levels", ())
        enough = max(levels) if min(levels, default=0) > self.enough_bits else self.enough_bits
        return max(8.0 if self.payload == "model" else enough, self.floor_bits or 0.0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.budget == "deadline" and self.deadline_s is None:
            raise ValueError("budget=deadline needs deadline_s")
        if self.floor_bits is not None and self.floor_bits > self.cap:
            raise ValueError(f"floor_bits ({self.floor_bits:g}) must not be above cap_bits ({self.cap:g})")
        return self

    @model_validator(mode="after")
    def _reads_bits(self) -> Self:
        if self.budget != "bits" and self.bits != 4.0:
            raise ValueError(f"bits={self.bits:g} is read only with budget=bits; set budget=bits, or floor_bits")
        return self


class Late(Budgeted):
    """Clients may miss a fixed deadline."""

    late: Literal["wait", "drop", "partial"] = key(
        "wait",
        "budget=deadline: clients that cannot send all layers in time: the round waits for them, continues without "
        "them, or they send what fits: the most significant layers (fedlq), or all at a lower rate (fedlq_rd)",
    )


class Levelled(Quantized):
    """Levels to choose from."""

    levels: tuple[Level, ...] = key((1, 2, 3, 4, 6, 8), "the levels to choose from", unit=BITS)

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if not self.levels or sorted(set(self.levels)) != list(self.levels):
            raise ValueError("levels must be distinct and rise, such as [1,2,4,8]")
        return self


class Probed(StrategyConfig):
    """Significance is measured while rounds train."""

    metric: Literal["loss", "accuracy", "squared_error", "fisher", "taylor", "hawq", "size", "random"] | None = key(
        None,
        "measure or predictor of a layer's drop; null: loss for fedlq, and squared_error, which needs no probe, for "
        "fedlq_rd",
    )
    probe_on: Literal["proxy", "clients"] = key(
        "proxy", "whose held-out samples: all clients', drawn once, or those of the round's cohort (time not billed)"
    )
    probe_every: int = key(10, "rounds between measurements of the drop", unit="rounds", ge=1)
    probe_samples: int = key(512, "held-out samples to measure on", unit="samples", ge=8)
    probe_decay: float = key(0.5, "weight of the past in the running average", ge=0, lt=1)


class FedLQ(Late, Levelled, Probed):
    """fedlq."""

    allocation: Literal["best", "greedy", "exact"] = key(
        "best",
        "how levels are found under a budget: nearly the least total drop and never more than one level for all, step "
        "by step as in the paper, or the least total drop (slow with more than 20 layers)",
    )
    significance: Literal["ratio", "sum"] = key(
        "ratio", "accuracy drop per memory saved, or a weighted sum (allocation=greedy only)"
    )
    significance_alpha: float = key(0.5, "significance=sum: weight of the accuracy drop", ge=0, le=1)


class FedLQRD(Late, Probed):
    """fedlq_rd."""

    enough_bits: ClassVar[float] = 1.0


class Every(FedLQ, Scoped):
    """A user's own strategy, which may read any setting and gets `args`."""

    args: Args = key({}, "the strategy's own arguments, such as {fraction: 0.01}")

    @model_validator(mode="after")
    def _reads_bits(self) -> Self:
        return self


class Qsgd(Scoped):
    """qsgd."""

    levels: int = own(7, "quantization levels between 0 and the norm", ge=1)
    bucket: int | None = own(512, "values that share a norm; null: those of a layer", ge=1)
    norm: Literal["l2", "max"] = own("max", "the norm of a bucket: Euclidean, or its largest magnitude")


class FedPAQ(Scoped):
    """fedpaq."""

    levels: int = own(7, "quantization levels between 0 and the norm", ge=1)


class TernGrad(Scoped):
    """terngrad."""

    clip: Positive | None = own(2.5, "values are clipped at this many standard deviations; null: no clipping")


class SignSGD(Scoped):
    """signsgd."""

    not_stale = "a vote has no stale votes"
    step: Positive = own(1e-3, "how far the server steps along the majority's signs")


class Sparse(Scoped):
    """topk, stc."""

    fraction: float = own(0.01, "share of the values that are sent", gt=0, le=1)


class AdaQuantFL(Scoped):
    """adaquantfl."""

    s0: int = own(2, "levels of the first round", ge=1)
    s_max: int = own(1024, "maximum number of levels", ge=1)


class DAdaQuant(Scoped):
    """dadaquant."""

    q_min: int = own(1, "initial levels", ge=1)
    q_max: int = own(16, "maximum number of levels", ge=1)
    psi: float = own(0.9, "weight of the past in the running loss", ge=0, lt=1)
    phi: int = own(10, "rounds over which the running loss is compared", unit="rounds", ge=2)


class FedDQ(Quantized):
    """feddq."""

    resolution: Positive = own(0.005, "allowed difference of two neighbouring levels, in the units of what is sent")


class AdaGQ(Quantized):
    """adagq."""

    s0: float = own(255.0, "initial levels; 255 levels are 8 bits", ge=1, le=255)
    lam: float = own(1.0, "levels added when the gradient's norm doubles")


class FedMPQ(Quantized, Budgeted):
    """fedmpq."""


class FedHQ(Levelled, Budgeted):
    """fedhq."""


class FedFQ(Scoped):
    """fedfq."""

    bits: float = own(4.0, "mean bits per parameter of a layer, 2 of them for the map", unit=BITS, gt=0, le=32)


class LGreCo(Quantized):
    """lgreco."""

    bits: int = own(4, "the reference; also the level before the first adjustment", unit=BITS, ge=1, le=8)
    alpha: Positive = own(1.0, "allowed error, as a multiple of the reference's")
    every: int = own(10, "rounds between adjustments", unit="rounds", ge=1)
    window: int = own(1, "last rounds before an adjustment, whose mean updates are averaged", unit="rounds", ge=1)


class Kimad(Levelled, Budgeted):
    """kimad."""

    round_s: Positive | None = own(
        None, "simulated time from a round's start to the end of the upload; null: a budget by `budget`", unit="s"
    )


class FedLUAR(Quantized):
    """fedluar."""

    not_stale = "all clients of a step leave the same layers out"
    recycled: int | None = own(
        None,
        "layers that are not sent in a round; null: half of those with a matrix, rounded down",
        unit="layers",
        ge=0,
    )
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32] = own(32, "level of the layers that are sent", unit=BITS)


class Uniform(Quantized, Scoped, Rated):
    """uniform."""


class ScopedRated(Scoped, Rated):
    """eden."""


SCHEMES: dict[str, type[StrategyConfig]] = {
    "fedavg": StrategyConfig,
    "float16": Scoped,
    "uniform": Uniform,
    "qsgd": Qsgd,
    "fedpaq": FedPAQ,
    "terngrad": TernGrad,
    "signsgd": SignSGD,
    "ef_signsgd": Scoped,
    "topk": Sparse,
    "stc": Sparse,
    "eden": ScopedRated,
    "adaquantfl": AdaQuantFL,
    "dadaquant": DAdaQuant,
    "feddq": FedDQ,
    "adagq": AdaGQ,
    "fedhq": FedHQ,
    "fedmpq": FedMPQ,
    "fedfq": FedFQ,
    "lgreco": LGreCo,
    "kimad": Kimad,
    "fedluar": FedLUAR,
    "ecsq": Rated,
    "fedlq": FedLQ,
    "fedlq_rd": FedLQRD,
}


def _name(settings: Any) -> str:
    """The union's tag for settings: a scheme, or "own"."""
    name = settings.get("name", "fedlq") if isinstance(settings, Mapping) else getattr(settings, "name", "fedlq")
    return name if isinstance(name, str) and name in SCHEMES else "own"


if TYPE_CHECKING:
    Chosen = StrategyConfig
else:
    _VARIANTS = tuple(Annotated[kind, Tag(name)] for name, kind in (SCHEMES | {"own": Every}).items())
    Chosen = Annotated[Union[_VARIANTS], Discriminator(_name)]  # noqa: UP007  # from a tuple


def own_settings(kind: type[StrategyConfig]) -> tuple[str, ...]:
    """The settings of one strategy only; they are arguments of its constructor."""
    extras = ((name, field.json_schema_extra) for name, field in kind.model_fields.items())
    return tuple(name for name, extra in extras if isinstance(extra, dict) and extra.get("own"))


def readers(setting: str) -> list[str]:
    """The schemes that read a setting of this name."""
    return [
        name for name, kind in SCHEMES.items() if setting in kind.model_fields and setting not in own_settings(kind)
    ]


def strategy_config(name: str = "fedlq", **settings: Any) -> StrategyConfig:
    """The checked settings of the strategy called `name`.

    Raises:
        ConfigError: a setting is wrong, or the strategy does not read it.
    """
    return SCHEMES.get(name, Every)(name=name, **settings)


def shared(config: StrategyConfig) -> dict[str, Any]:
    """The settings with the same meaning for every strategy that reads them."""
    own = own_settings(type(config))
    return {name: getattr(config, name) for name in type(config).model_fields if name not in own}


def renamed(config: StrategyConfig, name: str) -> StrategyConfig:
    """The settings of the strategy called `name`, with those of `config` that both read."""
    kind = SCHEMES.get(name, Every)
    kept = {key: value for key, value in shared(config).items() if key in kind.model_fields}
    return kind(**{**kept, "name": name})


def every(config: StrategyConfig) -> Every:
    """All settings, for a strategy given as an object: those of `config`, else the defaults."""
    return config if isinstance(config, Every) else Every.model_construct(**shared(config))
