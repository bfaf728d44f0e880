"""A simulator of communication-efficient federated learning: clients as Ray actors, quantized layer by layer."""

from typing import TYPE_CHECKING, Any

from fedlq_ray.config import Config
from fedlq_ray.errors import CheckpointError, ClientError, ConfigError, DivergedError, FedLQError, PayloadError

if TYPE_CHECKING:
    from fedlq_ray.simulation import Result, resume, simulate

__all__ = [
    "CheckpointError",
    "ClientError",
    "Config",
    "ConfigError",
    "DivergedError",
    "FedLQError",
    "PayloadError",
    "Result",
    "resume",
    "simulate",
]


def __getattr__(name: str) -> Any:
    # pandas and the rest are for who calls `simulate`: client processes never import them.
    if name in ("Result", "resume", "simulate"):
        from fedlq_ray import simulation

        return getattr(simulation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
