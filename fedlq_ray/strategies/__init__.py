"""Strategies by name. Each plans what every client sends, and is short enough to read next to its paper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedlq_ray.config import parts
from fedlq_ray.config.schemes import every, own_settings, renamed
from fedlq_ray.errors import ConfigError
from fedlq_ray.seeding import seeded
from fedlq_ray.strategies import fixed
from fedlq_ray.strategies.adagq import AdaGQ
from fedlq_ray.strategies.adaquantfl import AdaQuantFL
from fedlq_ray.strategies.base import Member, Probe, RoundResult, Strategy, StrategyContext
from fedlq_ray.strategies.dadaquant import DAdaQuant
from fedlq_ray.strategies.fedavg import FedAvg
from fedlq_ray.strategies.feddq import FedDQ
from fedlq_ray.strategies.fedfq import FedFQ
from fedlq_ray.strategies.fedhq import FedHQ
from fedlq_ray.strategies.fedlq import FedLQ
from fedlq_ray.strategies.fedlq_rd import EcsqFixed, FedLQRD
from fedlq_ray.strategies.fedluar import FedLUAR
from fedlq_ray.strategies.fedmpq import FedMPQ
from fedlq_ray.strategies.kimad import Kimad
from fedlq_ray.strategies.lgreco import LGreCo
from fedlq_ray.strategies.uniform import Uniform
from fedlq_ray.training.payloads import Feedback

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedavg": FedAvg,
    "float16": fixed.HalfPrecision,
    "uniform": Uniform,
    "qsgd": fixed.QsgdFixed,
    "fedpaq": fixed.FedPAQ,
    "terngrad": fixed.TernGradFixed,
    "signsgd": fixed.SignSGD,
    "ef_signsgd": fixed.EfSignSGD,
    "topk": fixed.TopKFixed,
    "stc": fixed.StcFixed,
    "eden": fixed.EdenFixed,
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
    "ecsq": EcsqFixed,
    "fedlq": FedLQ,
    "fedlq_rd": FedLQRD,
}


GivenStrategy = Strategy | Callable[..., Strategy] | str


def make(context: StrategyContext, given: GivenStrategy | None = None) -> Strategy:
    """The strategy of `context.config`, or the user's own: `given` is an object, a factory or a name.

    Raises:
        ConfigError: the strategy does not exist, or it has no `plan`.
    """
    named = context.config.name if given is None else given
    if given is not None:
        config = context.config
        context = replace(context, config=renamed(config, given) if isinstance(given, str) else every(config))
    own = {name: getattr(context.config, name) for name in own_settings(type(context.config))}
    factory = parts.find("strategy.name", named, STRATEGIES) if isinstance(named, str) else named
    made: Any = factory
    if isinstance(factory, type) or not hasattr(factory, "plan"):

        def call(feedback: Feedback) -> Any:
            offered = {"context": replace(context, error_feedback=feedback), **own}
            with seeded(context.seed, "strategy"):  # a user's strategy may draw from global generators
                return parts.call("strategy.name", factory, offered, getattr(context.config, "args", {}))

        asked, default = context.config.error_feedback, getattr(factory, "error_feedback", False)
        made = call(default if asked is None else asked)
        # A factory function has no default of its own; the strategy that it makes has one.
        if asked is None and (its := getattr(made, "error_feedback", default)) != default:
            made = call(its)
    if not callable(getattr(made, "plan", None)):
        raise ConfigError(f"strategy.name: {type(made).__name__} has no method plan")
    missing = [name for name in vars(Strategy) if not name.startswith("_") and not hasattr(made, name)]
    if missing:
        raise ConfigError(
            f"strategy.name: {type(made).__name__} has no {', '.join(missing)}; derive it from "
            "fedlq_ray.strategies.Strategy, which has them"
        )
    if isinstance(made, Strategy):
        vars(made)["_made"] = True  # from here on its attributes are constants
    strategy: Strategy[Any] = made
    return strategy


__all__ = ["STRATEGIES", "GivenStrategy", "Member", "RoundResult", "Probe", "StrategyContext", "Strategy", "make"]
