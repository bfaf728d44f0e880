"""Strategies by name: each a plan of what every client sends, short enough to be read next to its paper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedlq_ray import parts
from fedlq_ray.errors import ConfigError
from fedlq_ray.strategies import fixed
from fedlq_ray.strategies.adagq import AdaGQ
from fedlq_ray.strategies.adaquantfl import AdaQuantFL
from fedlq_ray.strategies.base import Member, News, Probe, Setting, Strategy
from fedlq_ray.strategies.dadaquant import DAdaQuant
from fedlq_ray.strategies.fedavg import FedAvg
from fedlq_ray.strategies.feddq import FedDQ
from fedlq_ray.strategies.fedfq import FedFQ
from fedlq_ray.strategies.fedhq import FedHQ
from fedlq_ray.strategies.fedlq import FedLQ
from fedlq_ray.strategies.fedlq_rd import EcsqFixed, FedLQRD
from fedlq_ray.strategies.fedmpq import FedMPQ
from fedlq_ray.strategies.kimad import Kimad
from fedlq_ray.strategies.lgreco import LGreCo
from fedlq_ray.strategies.uniform import Uniform

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
    "ecsq": EcsqFixed,
    "fedlq": FedLQ,
    "fedlq_rd": FedLQRD,
}


def make(setting: Setting, given: Any = None) -> Strategy:
    """The strategy of `setting.config`, or the user's own, `given` as an object or a factory.

    Raises:
        ConfigError: no such strategy, or it has no `plan`.
    """
    factory = parts.find("strategy.name", setting.config.name, STRATEGIES) if given is None else given
    if isinstance(factory, type) or not hasattr(factory, "plan"):
        feedback = setting.config.error_feedback
        own = bool(getattr(factory, "error_feedback", False))
        setting = replace(setting, error_feedback=own if feedback is None else feedback)
        factory = parts.call("strategy.name", factory, {"setting": setting}, setting.config.args)
    if not callable(getattr(factory, "plan", None)):
        raise ConfigError(f"strategy.name: {type(factory).__name__} has no method plan")
    return factory  # type: ignore[no-any-return]


__all__ = ["STRATEGIES", "Member", "News", "Probe", "Setting", "Strategy", "make"]
