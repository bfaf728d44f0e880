"""Each quantizer's squared error |Q(x) - x|^2 / |x|^2, and the bits a parameter of the whole payload, headers included.

Sources: 131,072 elements of a Gaussian, a Laplacian and Student's t with 4 degrees of freedom, as one layer; and
clients' updates (one local epoch from a model trained a few rounds), layer by layer as runs send them. A draw is new
elements and new rounding noise, or another client.

    python experiments/quantizers/errors.py --out experiments/quantizers/results.json
    python experiments/quantizers/errors.py --entropy      # how far payloads of the updates are above their entropy
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlq_ray.config.load import load
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.rounds import Timing, begin, run
from fedlq_ray.federation.selection import draw
from fedlq_ray.federation.task import Job, prepare
from fedlq_ray.hosts.serial import SerialHost
from fedlq_ray.quantization import (
    Ecsq,
    Eden,
    FineGrained,
    MinMax,
    Qsgd,
    QsgdElias,
    Quantizer,
    Segment,
    Sign,
    Stc,
    TernGrad,
    TopK,
    decode,
    encode,
)
from fedlq_ray.quantization.coding.codes import Magnitudes
from fedlq_ray.quantization.rate import OneStep, Stepped
from fedlq_ray.quantization.stochastic import StochasticStep
from fedlq_ray.runs import provenance
from fedlq_ray.strategies import make

COUNT = 2**17
WHERE = {"kind": "update", "round": 0, "client": 0}
TRAINED = [
    *("data.name=fashion-mnist", "model.name=cnn", "clients.count=50", "clients.cohort=10", "clients.hosting=serial"),
    *("train.lr=0.2", "train.batch_size=32", "train.local_epochs=1", "train.max_samples=600", "strategy.name=fedavg"),
    *("rounds=5", "evaluate_every=5", "target=null", "tracking.uri=null"),
]
Pieces = tuple[tuple[int, int], ...]


class Draw(NamedTuple):
    """A vector (d,) float32, and the (start, stop) of its layers."""

    vector: Tensor
    pieces: Pieces


def drawn(name: str, seed: int) -> Draw:
    source = np.random.default_rng(seed)
    values = {
        "Gaussian": source.normal,
        "Laplace": source.laplace,
        "Student t(4)": lambda size: source.standard_t(4, size),
    }
    return Draw(torch.from_numpy(values[name](size=COUNT).astype(np.float32)), ((0, COUNT),))


def updates(clients: int) -> list[Draw]:
    """The updates of the first clients of the cohort that comes after the rounds trained."""
    config = load(None, TRAINED)
    task = prepare(config)
    host = SerialHost(task)
    worker = host.worker
    strategy = make(worker.context)
    *_, last = run(task, strategy, host, begin(task, strategy), Timing())
    weights = last.state.weights
    print(f"trained {config.rounds} rounds, accuracy {last.record.accuracy:.3f}", flush=True)
    members = [cohorts.member(task, client, 0) for client in draw(task, config.rounds)[:clients]]
    samples = {m.client: cohorts.base_work(task, m.samples) for m in members}
    pieces = tuple((layer.start, layer.stop) for layer in worker.model.layers)
    found = []
    for client, plan in strategy.plan(last.state.strategy, config.rounds, members).items():
        reply, _ = worker.train(Job(config.rounds, client, plan, samples[client]), weights, None)
        sent = decode(reply.payload, len(weights), kind="update", round=config.rounds, client=client)
        found.append(Draw(sent.vector, pieces))
    return found


class Rate(NamedTuple):
    """A rate, in bits per parameter, to which one step for all layers is fitted."""

    bits: float
    quantizer: Callable[[float], Stepped]


def quantizers() -> dict[str, Quantizer | Rate]:
    """By name."""
    rows: dict[str, Quantizer | Rate] = {f"MinMax, {b} bit": MinMax(b) for b in (1, 2, 3, 4, 8)}
    rows |= {f"Qsgd, {b} bit": Qsgd(b) for b in (1, 2, 3, 4, 8)}
    rows |= {f"QsgdElias, l2, no buckets, s={s}": QsgdElias(s, None, "l2") for s in (1, 16, 128, 1024)}
    rows |= {f"QsgdElias, l2, buckets of 512, s={s}": QsgdElias(s, 512, "l2") for s in (1, 4, 16, 128)}
    rows |= {f"QsgdElias, max, buckets of 512, s={s}": QsgdElias(s, 512, "max") for s in (1, 3, 7, 127)}
    rows |= {"TernGrad, no clipping": TernGrad(None), "TernGrad, clipped at 2.5": TernGrad(2.5), "Sign": Sign()}
    rows |= {"TopK, 1 %": TopK(0.01), "Stc, 1 %": Stc(0.01), "FineGrained, 4 bit": FineGrained(4.0)}
    rates = (0.1, 0.25, 0.5, 1, 2, 3, 4, 8)
    rows |= {f"Eden, unbiased, {b:g} bit": Eden(b) for b in rates}
    rows |= {f"Eden, least error, {b:g} bit": Eden(b, unbiased=False) for b in rates}
    rows |= {f"Ecsq, {b:g} bit": Rate(b, Ecsq) for b in (0.1, 0.25, 0.5, 1, 2, 3, 4)}
    rates = (0.03, 0.05, 0.08, 0.12, 0.16, 0.25, 0.5, 1, 2, 4)
    return rows | {f"StochasticStep, {b:g} bit": Rate(b, StochasticStep) for b in rates}


def measure(chosen: Quantizer | Rate, draw: Draw, seed: int) -> tuple[float, float]:
    """Bits a parameter of the payload, and the error of what it decodes to."""
    vector, pieces = draw
    if isinstance(chosen, Rate):
        segments = OneStep(pieces, (1.0,) * len(pieces), chosen.bits * len(vector) / 8, chosen.quantizer)(vector)
    else:
        segments = tuple(Segment(chosen, start, stop) for start, stop in pieces)
    payload = encode(vector, segments, rng=torch.Generator().manual_seed(seed), **WHERE)
    lost = decode(payload, len(vector), **WHERE).vector.double() - vector.double()
    return 8 * len(payload) / len(vector), float(lost.square().sum() / vector.double().square().sum())


def entropy(draw: Draw, bits: float) -> tuple[int, int, float]:
    """Bytes of Ecsq's payload, of its bodies alone, and of the entropy of its codes, layer by layer."""
    vector, pieces = draw
    segments = OneStep(pieces, (1.0,) * len(pieces), bits * len(vector) / 8)(vector)
    rng = torch.Generator()
    bodies, least = 0, 0.0
    for quantizer, start, stop in segments:
        x = vector[start:stop]
        edges = quantizer.design(Magnitudes.of(x)).edges
        codes = np.searchsorted(edges, x.abs().numpy()) * np.sign(x.numpy()).astype(np.int32)
        shares = np.unique(codes, return_counts=True)[1] / len(x)
        least -= float((shares * np.log2(shares)).sum()) * len(x) / 8
        bodies += len(quantizer.encode(x, rng))
    return len(encode(vector, segments, rng=rng, **WHERE)), bodies, least


def markdown(rows: list[dict]) -> str:
    """A line a quantizer: for each source the bits and the error; for the Gaussian also the bits above R(D)."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    titles = [f"{name}: bits | error" for name in sources]
    lines = ["| quantizer | " + " | ".join([titles[0], "above R(D)", *titles[1:]]) + " |"]
    lines.append("|" + " --- |" * (2 + 2 * len(sources)))
    for name in dict.fromkeys(row["quantizer"] for row in rows):
        cells = []
        for row in (row for row in rows if row["quantizer"] == name):
            cells += [f"{row['bits']:.3f}", f"{row['error']:.4g} ± {row['error_sd']:.1g}"]
            if row["source"] == "Gaussian":
                cells.append(f"{row['bits'] + np.log2(row['error']) / 2:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save_sample(draw: Draw, path: Path) -> None:
    """An update for the tests: every third element of what is large, in units of the root mean square, as float16."""
    pieces = [draw.vector[start:stop] for start, stop in draw.pieces]
    kept = [piece[::3] if len(piece) > 20_000 else piece for piece in pieces]
    scaled = torch.cat(kept) / draw.vector.square().mean().sqrt()
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, update=scaled.numpy().astype(np.float16), sizes=[len(piece) for piece in kept])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sample", type=Path, help="where to save part of the first update, as the tests have it")
    parser.add_argument("--entropy", action="store_true", help="payloads of the updates against their entropy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.entropy:
        found = updates(options.draws)
        for bits in (0.1, 0.25, 0.5, 1.0, 2.0):
            each = [entropy(draw, bits) for draw in found]
            print(f"{bits:g} bit, above the entropy, %, payload and bodies alone:")
            print("  " + ", ".join(f"{100 * (a / e - 1):.1f} {100 * (b / e - 1):.1f}" for a, b, e in each))
        return
    sources = {
        name: [drawn(name, seed) for seed in range(options.draws)] for name in ("Gaussian", "Laplace", "Student t(4)")
    }
    sources["update"] = updates(options.draws)
    if options.sample:
        save_sample(sources["update"][0], options.sample)
        return
    rows = []
    for name, chosen in quantizers().items():
        for source, draws in sources.items():
            bits, errors = zip(*(measure(chosen, draw, seed) for seed, draw in enumerate(draws)), strict=True)
            means = {"bits": statistics.mean(bits), "error": statistics.mean(errors)}
            rows.append({"quantizer": name, "source": source} | means | {"error_sd": statistics.stdev(errors)})
    print(markdown(rows))
    if options.out:
        made_by = {"commit": provenance.commit(), "machine": provenance.machine(), "versions": provenance.versions()}
        command = f"python experiments/quantizers/errors.py --draws {options.draws} --out {options.out}"
        result = {"command": command} | made_by | {"draws": options.draws, "elements": COUNT, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
