"""Quantizers, and the wire format that carries their output."""

from collections.abc import Callable
from typing import Any

from fedlq_ray.config import parts
from fedlq_ray.errors import ConfigError
from fedlq_ray.quantization.base import Quantizer
from fedlq_ray.quantization.ecsq import Ecsq
from fedlq_ray.quantization.eden import Eden
from fedlq_ray.quantization.finegrained import FineGrained
from fedlq_ray.quantization.qsgd import Qsgd
from fedlq_ray.quantization.qsgd_elias import QsgdElias
from fedlq_ray.quantization.registry import QUANTIZERS, Family
from fedlq_ray.quantization.scalar import Absent, Float16, Float32, MinMax
from fedlq_ray.quantization.sign import Sign
from fedlq_ray.quantization.sparse import Stc, TopK
from fedlq_ray.quantization.terngrad import TernGrad
from fedlq_ray.quantization.wire import LAYER_HEADER, PAYLOAD_HEADER, Payload, Segment, decode, encode, send


class Always:
    """A family in which every level uses the same quantizer, a user's object."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, bits: int) -> Quantizer:
        return self.quantizer


GivenQuantizer = Quantizer | Callable[..., Quantizer] | str


def family(name: str, given: GivenQuantizer | None = None) -> Family:
    """Returns a function from level to quantizer: a built-in by name, or a user's own by import path or as an object.

    `given`, an object or a name, overrides `name`. A custom quantizer is an object with the methods of `Quantizer`, or
    a class or function that returns one and may take `bits`.

    Raises:
        ConfigError: the quantizer does not exist, or it lacks a method of `Quantizer`.
    """
    named = name if given is None else given
    part: Any = parts.find("strategy.quantizer", named, QUANTIZERS) if isinstance(named, str) else named
    if known := [name for name, builtin in QUANTIZERS.items() if part is builtin]:
        return QUANTIZERS[known[0]]
    made = parts.call("strategy.quantizer", part, {"bits": 1}, {}) if _is_factory(part) else part
    missing = [method for method in ("encode", "decode", "size") if not callable(getattr(made, method, None))]
    if missing:
        raise ConfigError(f"strategy.quantizer: {type(made).__name__} has no method {', '.join(missing)}")
    return part if _is_factory(part) and parts.takes(part, "bits") else Always(made)


def _is_factory(part: Any) -> bool:
    return isinstance(part, type) or (callable(part) and not isinstance(part, Quantizer))


__all__ = [
    "GivenQuantizer",
    "LAYER_HEADER",
    "PAYLOAD_HEADER",
    "QUANTIZERS",
    "Absent",
    "Ecsq",
    "Eden",
    "Family",
    "FineGrained",
    "Float16",
    "Float32",
    "MinMax",
    "Payload",
    "Qsgd",
    "QsgdElias",
    "Quantizer",
    "Segment",
    "Sign",
    "Stc",
    "TernGrad",
    "TopK",
    "decode",
    "encode",
    "family",
    "send",
]
