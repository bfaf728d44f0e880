"""Speed and error of each quantizer and level on one core, beside copying and NumPy's own conversion.

    python experiments/benchmarks/codec.py --out experiments/benchmarks/codec.json

The vector is a million draws of N(0, 1). Speed is GB of float32 a second in the best of many passes; error is
|Q(x) - x|^2 / |x|^2, the mean of --draws. Beside it stand what EDEN (Vargaftik et al., ICML 2022,
arXiv:2108.08842) tends to with the scale of least error, and the least that any code can reach on a Gaussian at the
same bits, 2^(-2 bits).
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import constriction
import harness
import numpy as np
import torch

from fedlq_ray.quantization import (
    Ecsq,
    Eden,
    FineGrained,
    Float16,
    Float32,
    MinMax,
    Qsgd,
    QsgdElias,
    Sign,
    Stc,
    TernGrad,
    TopK,
)
from fedlq_ray.quantization.coding.codes import Magnitudes, categorical
from fedlq_ray.quantization.stochastic import StochasticStep

QUANTIZERS = {
    "Float32": Float32(),
    "Float16": Float16(),
    **{f"MinMax, {bits} bits": MinMax(bits) for bits in range(1, 9)},
    **{f"QSGD, {bits} bits": Qsgd(bits) for bits in range(1, 9)},
    "QSGD, Elias, s = 4": QsgdElias(4),
    "TernGrad": TernGrad(),
    "Sign": Sign(),
    "TopK, 1 %": TopK(0.01),
    "TopK, 10 %": TopK(0.1),
    "STC, 1 %": Stc(0.01),
    "STC, 10 %": Stc(0.1),
    **{f"EDEN, {bits:g} bits": Eden(bits, unbiased=False) for bits in (0.25, 0.5, 1, 2, 3, 4, 6, 8)},
    **{f"ECSQ, step {step:g}": Ecsq(step) for step in (3.0, 1.8, 1.1, 0.5, 0.25)},
    **{f"StochasticStep, step {step:g}": StochasticStep(step) for step in (50.0, 12.0, 3.0, 0.5)},
    "FineGrained, 4 bits": FineGrained(4.0),
}
# Lloyd-Max's distortion on N(0, 1) (Max, IRE Trans. Inf. Theory 6(1), 1960, table I): EDEN's, with its best scale.
EDEN_ERROR = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def best(call: Callable[[], Any], seconds: float) -> float:
    """Seconds of processor time of the fastest pass, among as many as fit."""
    call()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        started = time.thread_time()
        call()
        found.append(time.thread_time() - started)
    return min(found)


def coder(step: float, x: torch.Tensor, seconds: float) -> dict[str, float]:
    """Million symbols a second of the range coder alone, in and out, on the magnitudes' codes that ECSQ gives it.

    Signs, which are cheaper, are left out of time and symbols; bits are those of an element's magnitude.
    """
    _, edges, model, _, _ = Ecsq(step).design(Magnitudes.of(x))
    codes = np.searchsorted(edges, x.abs().numpy()).astype(np.int32)

    def write() -> Any:
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(codes, categorical(model))
        return encoder.get_compressed()

    words = write()

    def read() -> Any:
        return constriction.stream.queue.RangeDecoder(words).decode(categorical(model, decode=True), len(codes))

    symbols = len(codes) / 1e6
    bits = 32 * len(words) / len(codes)
    return {"bits": bits, "in": symbols / best(write, seconds), "out": symbols / best(read, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, seconds = options.elements, options.seconds
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    rng, space = torch.Generator().manual_seed(1), np.empty(count, np.float32)

    def speed(call: Callable[[], Any]) -> float:
        return 4 * count / best(call, seconds) / 1e9

    half = x.numpy().astype(np.float16)
    results: dict[str, dict[str, Any]] = {
        "memcpy": {"encode": speed(lambda: np.copyto(space, x.numpy()))},
        "numpy astype(float16)": {
            "encode": speed(lambda: x.numpy().astype(np.float16)),
            "decode": speed(lambda: half.astype(np.float32)),
        },
        "torch.rand, float32": {"encode": speed(lambda: torch.rand(count, generator=rng))},
    }
    for name, quantizer in QUANTIZERS.items():
        bodies = [quantizer.encode(x, rng) for _ in range(options.draws)]
        views = [memoryview(body) for body in bodies]
        errors = [float((quantizer.decode(view, count) - x).double().square().sum()) for view in views]
        results[name] = {
            "bits": 8 * float(np.mean([len(body) for body in bodies])) / count,
            "encode": speed(partial(quantizer.encode, x, rng)),
            "decode": speed(partial(quantizer.decode, views[0], count)),
            "error": float(np.mean(errors)) / float(x.double().square().sum()),
        }
    coded = {f"{step:g}": coder(step, x, seconds) for step in (3.0, 1.8, 1.1, 0.5, 0.25)}
    heads = ["", "bits an element", "encode, GB/s", "decode, GB/s", "error", "EDEN's", "Gaussian bound"]
    rows = []
    for name, found in results.items():
        level = float(name.split()[1]) if name.startswith("EDEN") else None
        cells = [f"{found[key]:{form}}" if key in found else "" for key, form in _COLUMNS]
        bound = f"{4 ** -found['bits']:.3g}" if found.get("error") and found["bits"] < 16 else ""
        rows.append([name, *cells, f"{EDEN_ERROR[level]:.3g}" if level in EDEN_ERROR else "", bound])
    print(harness.table(heads, rows))
    speeds = [[step, *(f"{found[key]:.3g}" for key in ("bits", "in", "out"))] for step, found in coded.items()]
    print("\n" + harness.table(["ECSQ step", "bits a magnitude", "Msymbol/s in", "Msymbol/s out"], speeds))
    harness.keep(options.out, {"elements": count, "quantizers": results, "entropy_coder": coded})


_COLUMNS = (("bits", ".3g"), ("encode", ".3g"), ("decode", ".3g"), ("error", ".3g"))


if __name__ == "__main__":
    main()
