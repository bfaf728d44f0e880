"""The wire decoder on spoiled payloads: `python tests/fuzz.py --cases 1000000`.

Each case is a payload of some quantizer with bytes changed, cut out, doubled or appended, and a checksum that fits. It
must decode to finite numbers of the right count, or be refused by a PayloadError. A line of JSON tells what came of it.
"""

import argparse
import json
import random
import resource
import struct
import time
import zlib
from collections import Counter

import torch

from fedlq_ray.errors import PayloadError
from fedlq_ray.quantization import PAYLOAD_HEADER, Segment, decode, encode
from fedlq_ray.quantization.registry import DECODERS

WHERE = {"kind": "update", "round": 3, "client": 9}
SIZES = (1, 3, 17, 70)


def seeds() -> list[tuple[str, bytes, int]]:
    """A payload of each quantizer in each size, twice: alone, and followed by another piece."""
    found = []
    for number, quantizer in DECODERS.items():
        for size in SIZES:
            for other in (None, DECODERS[(number + 3) % len(DECODERS)]):
                x = torch.randn(2 * size if other else size, generator=torch.Generator().manual_seed(size))
                pieces = [Segment(quantizer, 0, size)] + ([Segment(other, size, 2 * size)] if other else [])
                data = encode(x, pieces, rng=torch.Generator().manual_seed(0), **WHERE)  # type: ignore[arg-type]
                found.append((type(quantizer).__name__, data, len(x)))
    return found


def spoil(data: bytes, draw: random.Random) -> bytes:
    """Some change, mostly behind the header, and a checksum that fits it."""
    spoiled = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        behind = len(spoiled) > PAYLOAD_HEADER and draw.random() < 0.95
        at = draw.randrange(PAYLOAD_HEADER if behind else 0, len(spoiled))
        how = draw.random()
        if how < 0.5:
            spoiled[at] = draw.randrange(256)
        elif how < 0.7:
            spoiled[at] ^= 1 << draw.randrange(8)
        elif how < 0.8:
            spoiled[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\x7f"))
        elif how < 0.9 and len(spoiled) > PAYLOAD_HEADER + 2:
            del spoiled[at : at + draw.randrange(1, 6)]
        else:
            spoiled[at:at] = draw.randbytes(draw.randrange(1, 6))
    if len(spoiled) < PAYLOAD_HEADER:
        return bytes(spoiled)
    head, rest = bytes(spoiled[: PAYLOAD_HEADER - 4]), bytes(spoiled[PAYLOAD_HEADER:])
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw, corpus, came = random.Random(given.seed), seeds(), Counter[str]()
    before, started, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), 0.0
    for case in range(given.cases):
        name, data, count = draw.choice(corpus)
        spoiled, began = spoil(data, draw), time.perf_counter()
        try:
            vector = decode(spoiled, count, **WHERE).vector  # type: ignore[arg-type]
            assert vector.shape == (count,) and torch.isfinite(vector).all(), (case, name)
            came["decoded"] += 1
        except PayloadError:
            came["refused"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    figures = {"slowest_ms": round(1e3 * slowest, 1), "grown_mb": round(grown / 1e3, 1)}
    print(
        json.dumps(
            {"cases": given.cases, "seed": given.seed, **came, **figures, "s": round(time.perf_counter() - started)}
        )
    )


if __name__ == "__main__":
    main()
