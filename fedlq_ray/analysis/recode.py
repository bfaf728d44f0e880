"""What other entropy coders would have needed for the payloads that a run has kept (`payloads=true`).

A segment's symbols are its codes: the distinct values that it decodes to, numbered. Coders get one byte per symbol (two
where there are more than 256), each segment alone, as quantizers code it. Quantizers whose values are not a few codes
(float32, float16, EDEN after its rotation, QSGD in buckets, sparse ones, and a user's own) are coded as the bytes of
their bodies.
"""

import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import pyarrow
from numpy.typing import NDArray

from fedlq_ray.errors import ConfigError, PayloadError
from fedlq_ray.quantization import (
    LAYER_HEADER,
    PAYLOAD_HEADER,
    Ecsq,
    MinMax,
    Qsgd,
    QsgdElias,
    Quantizer,
    Sign,
    TernGrad,
)
from fedlq_ray.quantization.clipped import Clipped
from fedlq_ray.quantization.coding import codes
from fedlq_ray.quantization.registry import DECODERS
from fedlq_ray.quantization.stochastic import StochasticStep
from fedlq_ray.quantization.wire import bodies
from fedlq_ray.runs import payloads, rundir

# Quantizers with a few values per segment, and the bytes of a body that are not codes.
SCALARS: dict[type, int] = {
    **{kind: int(kind().size(0)) for kind in (MinMax, Clipped, Qsgd, Sign, TernGrad)},
    QsgdElias: QsgdElias.HEADER.size + 4,  # with one norm
    Ecsq: codes.HEADER.size + 4,
    StochasticStep: codes.HEADER.size,
}
SAMPLE = 100  # payloads that are coded again; a run with more has so many, evenly spaced


def plain(symbols: NDArray[Any], kinds: int) -> float:
    """Bytes of symbols at a fixed number of bits each."""
    return float((len(symbols) * math.ceil(math.log2(kinds)) + 7) // 8) if kinds > 1 else 0.0


def entropy(symbols: NDArray[Any], kinds: int) -> float:
    """Bytes of symbols at their order-0 entropy: a bound for coders without context, which leaves out their tables."""
    counts = np.bincount(symbols, minlength=kinds)
    shares = counts[counts > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum() * len(symbols) / 8) + 0.0


def ranged(symbols: NDArray[Any], kinds: int) -> float:
    """Bytes of a range coder with the symbols' own frequencies, and of their table, two bytes per distinct symbol."""
    if kinds < 2:
        return 0.0
    counts = np.bincount(symbols, minlength=kinds)
    table = np.maximum(1, np.rint(counts / counts.max() * 65535))
    model = constriction.stream.model.Categorical(table / table.sum(), perfect=False)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(symbols.astype(np.int32), model)
    return float(coder.get_compressed().nbytes + 2 * kinds)


def _of_bytes(compress: Callable[[bytes], bytes]) -> Callable[[NDArray[Any], int], float]:
    def size(symbols: NDArray[Any], kinds: int) -> float:
        return float(len(compress(symbols.astype(np.uint8 if kinds <= 256 else "<u2").tobytes())))

    return size


_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
CODERS: dict[str, Callable[[NDArray[Any], int], float]] = {
    "none": plain,
    "entropy": entropy,
    "range": ranged,
    "zstd": _of_bytes(lambda data: pyarrow.Codec("zstd", compression_level=19).compress(data, asbytes=True)),
    "zlib": _of_bytes(lambda data: zlib.compress(data, 9)),
    "bz2": _of_bytes(lambda data: bz2.compress(data, 9)),
    "lzma": _of_bytes(lambda data: lzma.compress(data, format=lzma.FORMAT_RAW, filters=_LZMA)),
}


@dataclass
class Stream:
    """All segments of one quantizer.

    Attributes:
        quantizer: its name.
        coded: whether coders got its codes; else the bytes of its bodies.
        segments, elements: how many.
        sent: bytes of its bodies, as sent.
        coders: bytes by coder, with the scalars that stay as they are.
    """

    quantizer: str
    coded: bool
    segments: int = 0
    elements: int = 0
    sent: int = 0
    coders: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CODERS, 0.0))

    def add(self, elements: int, body: memoryview, symbols: NDArray[Any], kinds: int, scalars: int) -> None:
        """Adds a segment."""
        self.segments, self.elements, self.sent = self.segments + 1, self.elements + elements, self.sent + len(body)
        for name, coder in CODERS.items():
            self.coders[name] += scalars + (coder(symbols, kinds) if len(symbols) else 0.0)


@dataclass(frozen=True)
class Recoded:
    """What a run's payloads need with other coders.

    Attributes:
        kept, payloads: how many payloads the run has kept, and how many of them were coded again.
        headers: bytes of these payloads' headers, which stay as they are.
        streams: one per quantizer.
    """

    kept: int
    payloads: int
    headers: int
    streams: list[Stream]

    @property
    def sent(self) -> int:
        """Bytes of the payloads that were coded again, as sent."""
        return self.headers + sum(stream.sent for stream in self.streams)

    def whole(self, coder: str) -> float:
        """Bytes of these payloads with a coder."""
        return self.headers + sum(stream.coders[coder] for stream in self.streams)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping."""
        totals = {coder: self.whole(coder) for coder in CODERS}
        return vars(self) | {"streams": [vars(s) for s in self.streams], "sent": self.sent, "coders": totals}


def recode(folder: str | Path, sample: int = SAMPLE) -> Recoded:
    """Codes a run's payloads again.

    Args:
        folder: of the run.
        sample: at most so many payloads, evenly spaced.
    Raises:
        ConfigError: the folder holds no run, it has kept no payloads, or they are damaged.
    """
    folder = Path(folder)
    rundir.settings(folder)
    kept = payloads.count(folder)
    every, streams, taken, headers = -(-kept // sample), dict[str, Stream](), 0, 0
    try:
        for payload in islice(payloads.read(folder), 0, None, every):
            taken, headers = taken + 1, headers + PAYLOAD_HEADER
            for number, elements, body in bodies(payload):
                headers += LAYER_HEADER
                _add(streams, number, elements, body)
    except PayloadError as exc:
        raise ConfigError(f"{folder / payloads.NAME}: is damaged: {exc}") from exc
    return Recoded(kept, taken, headers, list(streams.values()))


def _scalars(quantizer: Quantizer | None, elements: int, body: memoryview) -> int | None:
    """Bytes of a body that are not codes; None if its values are not a few codes."""
    if isinstance(quantizer, QsgdElias) and len(body) >= quantizer.HEADER.size:
        _, _, bucket = quantizer.HEADER.unpack_from(body)
        if 0 < bucket < elements:
            return None
    return SCALARS.get(type(quantizer))


def _add(streams: dict[str, Stream], number: int, elements: int, body: memoryview) -> None:
    """Adds a segment to its quantizer's stream."""
    quantizer = DECODERS.get(number)
    name = type(quantizer).__name__ if quantizer else "own"
    scalars = _scalars(quantizer, elements, body)
    stream = streams.setdefault(f"{name} {scalars}", Stream(name, scalars is not None))
    if quantizer is None or scalars is None:
        found = np.frombuffer(body, np.uint8)
        stream.add(elements, body, found, 256, 0)
    else:
        values, symbols = np.unique(quantizer.decode(body, elements).numpy(), return_inverse=True)
        stream.add(elements, body, symbols, len(values), scalars)
