"""The quantizers of this package, found in its modules: a new one takes a new file only."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlq_ray.quantization.base import Quantizer

Family = Callable[[int], Quantizer]
_OTHERS = {"base", "rate", "registry", "wire"}  # modules without a quantizer


def _found() -> dict[int, Any]:
    """The classes that declare a number on the wire, by it."""
    found: dict[int, Any] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.ispkg or module.name in _OTHERS:
            continue
        for made in vars(importlib.import_module(f"{__package__}.{module.name}")).values():
            number = vars(made).get("number") if isinstance(made, type) else None
            if isinstance(number, int) and found.setdefault(number, made) is not made:
                raise TypeError(f"{made.__name__} and {found[number].__name__} have the same number {number}")
    return dict(sorted(found.items()))


_CLASSES = _found()
# The decoder of each number. A body holds everything that decoding needs, so its settings do not matter.
DECODERS: dict[int, Quantizer] = {number: made() for number, made in _CLASSES.items()}
NUMBERS: dict[type, int] = {made: number for number, made in _CLASSES.items()}
# The quantizers that take a level of 1 to 8 bits, by name.
QUANTIZERS: dict[str, Family] = {made.family: made for made in _CLASSES.values() if hasattr(made, "family")}
