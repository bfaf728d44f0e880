"""The bound of docs/theory.md against runs: does it hold, does it order levels and allocations, how loose is it.

FedAvg in float64 with the project's quantizers on a quadratic and on logistic regression, whose constants are known. At
each mean rate the same bits are also given to layers by significance (curvature times energy, the Proposition of
section 6), by energy alone (Theorem 1), and by the reciprocal of significance; at 3 bits, at random as well.

    python experiments/theory/bound.py
"""

import argparse
import json
import time
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

from fedlq_ray.plots import COLOURS
from fedlq_ray.quantization import Float32, MinMax, Qsgd
from fedlq_ray.runs import provenance
from fedlq_ray.significance.allocation import exact
from fedlq_ray.significance.bounds import Problem, convergence_bound, mean_error
from fedlq_ray.significance.error_factors import minmax_error, qsgd_q

HERE = Path(__file__).parent
LAYERS = np.array([8, 8, 16, 32])
TOPS = np.array([1.0, 0.5, 0.25, 0.1])  # curvature by layer: the largest layer has the least
EDGES = np.cumsum([0, *LAYERS])
SIZE = int(EDGES[-1])
SHARES = np.array([0.1, 0.15, 0.2, 0.25, 0.3])
ROUNDS, STEPS = 40, 4
NEAR = 0.05  # from the optimum, in each element, at the start: levels matter most there
LEVELS, MIXED = (1, 2, 3, 4, 8), (2, 3, 4)
RANDOM = 6  # plans at 3 bits
KINDS = {"min-max": MinMax, "QSGD": Qsgd}


class Quadratic:
    """(w - a_i)' A (w - a_i) / 2, with Gaussian noise of variance 1 on each gradient. All constants are exact."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.curvature = np.concatenate(
            [np.geomspace(top, top / 5, size) for top, size in zip(TOPS, LAYERS, strict=True)]
        )
        self.targets = rng.normal(size=(len(SHARES), SIZE))
        centre = SHARES @ self.targets
        self.start = centre + NEAR
        apart = float(SHARES @ ((self.curvature * (self.targets - centre)) ** 2).sum(1))
        self.problem = Problem(1.0, 1.0, apart, float(self.curvature.sum() * NEAR**2 / 2))
        self.smoothness = TOPS

    def gradients(self, w):
        return self.curvature * (w - self.targets)

    def noisy(self, w, rng):
        return self.gradients(w) + rng.normal(size=w.shape) / SIZE**0.5

    def variance(self, w):
        return np.ones(w.shape[:2])

    def parts(self, lr):
        """What the start and the noise each put into the mean squared gradient, exactly, where nothing is quantized.
        Drift puts nothing: as all share A, the mean of what clients do is what one client would do."""
        shrink = (1 - lr * self.curvature) ** STEPS
        fresh = (SHARES**2).sum() * lr**2 / SIZE * sum((1 - lr * self.curvature) ** (2 * k) for k in range(STEPS))
        start, noise, off, spread = 0.0, 0.0, np.full(SIZE, NEAR), np.zeros(SIZE)
        for _ in range(ROUNDS):
            start += float(((self.curvature * off) ** 2).sum()) / ROUNDS
            noise += float((self.curvature**2 * spread).sum()) / ROUNDS
            off, spread = off * shrink, spread * shrink**2 + fresh
        return {"start": start, "noise": noise, "drift": 0.0}


class Logistic:
    """log(1 + exp(-v_j'w)) + mu |w|^2 / 2 over a client's 40 samples, of which a gradient draws one.

    L, sigma^2 and sigma_g^2 are bounds over all w, as in tests/significance/test_bounds.py; f* by Newton's method.
    """

    def __init__(self):
        rng = np.random.default_rng(2)
        clients, m, self.mu = len(SHARES), 40, 0.05
        scale = np.repeat(np.sqrt(TOPS * 4 / LAYERS), LAYERS)
        x = scale * (rng.normal(size=(clients, m, SIZE)) + 0.3 * rng.normal(size=(clients, 1, SIZE)))
        right = x @ rng.normal(size=SIZE) + 0.5 * rng.normal(size=(clients, m)) > 0
        self.rows = x * np.where(right, 1.0, -1.0)[..., None]
        tops = np.array([np.linalg.eigvalsh(v.T @ v / m)[-1] for v in self.rows])
        hessian = np.einsum("i,imd,ime->de", SHARES / m, self.rows, self.rows) / 4
        blocks = [hessian[a:b, a:b] for a, b in zip(EDGES, EDGES[1:], strict=False)]
        self.smoothness = np.array([np.linalg.eigvalsh(block)[-1] + self.mu for block in blocks])
        optimum = self.minimiser()
        self.start = optimum + NEAR
        self.problem = Problem(
            smoothness=float(tops.max() / 4 + self.mu),
            noise=float((self.rows**2).sum(2).mean(1).max()),
            heterogeneity=float(SHARES @ tops),
            gap=self.loss(self.start) - self.loss(optimum),
        )

    def loss(self, w):
        return float(SHARES @ np.logaddexp(0, -self.rows @ w).mean(1) + self.mu * w @ w / 2)

    def minimiser(self):
        w = np.zeros(SIZE)
        for _ in range(30):
            s = 1 / (1 + np.exp(self.rows @ w))
            weight = SHARES[:, None] * s * (1 - s) / s.shape[1]
            hessian = np.einsum("im,imd,ime->de", weight, self.rows, self.rows) + self.mu * np.eye(SIZE)
            gradient = SHARES @ self.gradients(np.broadcast_to(w, (1, len(SHARES), SIZE)))[0]
            w = w - np.linalg.solve(hessian, gradient)
        assert np.linalg.norm(gradient) < 1e-12
        return w

    def odds(self, w):
        return 1 / (1 + np.exp(np.einsum("imd,nid->nim", self.rows, w)))

    def gradients(self, w):
        return self.mu * w - np.einsum("nim,imd->nid", self.odds(w), self.rows) / self.rows.shape[1]

    def noisy(self, w, rng):
        v = self.rows[np.arange(len(SHARES)), rng.integers(self.rows.shape[1], size=w.shape[:2])]
        return self.mu * w - v / (1 + np.exp((v * w).sum(2)))[..., None]

    def variance(self, w):
        """E|noise|^2 of each client's gradient, (seeds, clients)."""
        squares = (self.odds(w) ** 2 * (self.rows**2).sum(2)).mean(2)
        return squares - ((self.mu * w - self.gradients(w)) ** 2).sum(2)


@dataclass
class Run:
    """Squared gradients (seeds,), averaged over rounds; and (rounds, seeds, clients, layers) squared norms, ranges and
    squared errors of what was sent; sigma^2 and sigma_g^2 where the run went."""

    gradients: np.ndarray
    norms: np.ndarray
    spans: np.ndarray
    errors: np.ndarray
    noise: float
    heterogeneity: float


def fedavg(losses, quantizers, seeds, seed=0):
    """All clients, all seeds at once; quantizers one a layer. The gradients' noise is the same for every plan."""
    rng, rounding = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    lr = step(losses)
    w = np.tile(losses.start, (seeds, 1))
    gradients, norms, spans, errors, noise, apart = [], [], [], [], [], []
    for _ in range(ROUNDS):
        local = np.repeat(w[:, None], len(SHARES), 1)
        own = losses.gradients(local)
        mean = np.einsum("i,nid->nd", SHARES, own)
        gradients.append((mean**2).sum(1))
        apart.append((SHARES @ ((own - mean[:, None]) ** 2).sum(2).T).mean())
        variances = []
        for _ in range(STEPS):
            variances.append(losses.variance(local).mean(0))
            local = local - lr * losses.noisy(local, rng)
        noise.append(variances)
        sent = local - w[:, None]
        received = send(sent, quantizers, rounding)
        norms.append(by_layer(sent**2, np.sum))
        spans.append(by_layer(sent, np.ptp))
        errors.append(by_layer((received - sent) ** 2, np.sum))
        w = w + np.einsum("i,nid->nd", SHARES, received)
    # The proof needs sigma^2 of each client and step, and sigma_g^2, in the mean over rounds alone.
    visited = float(np.mean(noise, 0).max()), float(np.mean(apart))
    return Run(np.mean(gradients, 0), np.array(norms), np.array(spans), np.array(errors), *visited)


def send(sent, quantizers, rounding):
    """What the server decodes."""
    out = np.empty_like(sent)
    for n, i in np.ndindex(sent.shape[:2]):
        for quantizer, a, b in zip(quantizers, EDGES, EDGES[1:], strict=False):
            body = quantizer.encode(torch.from_numpy(sent[n, i, a:b]).float(), rounding)
            out[n, i, a:b] = quantizer.decode(memoryview(body), int(b - a)).numpy()
    return out


def by_layer(values, function):
    return np.stack([function(piece, axis=2) for piece in np.split(values, EDGES[1:-1], axis=2)], 2)


def step(losses):
    return 1 / (8 * losses.problem.smoothness * STEPS)


def error_bounds(kind, levels, run):
    """A5's epsilon of every layer that was sent: by ranges for min-max, by norms for QSGD."""
    levels = np.asarray(levels)
    return minmax_error(levels, LAYERS, run.spans) if kind == "min-max" else qsgd_q(levels, LAYERS) * run.norms


def bound(losses, problem, error):
    return convergence_bound(problem, lr=step(losses), local_steps=STEPS, rounds=ROUNDS, shares=SHARES, error=error)


def plans(losses, kind, pilot):
    """By name: levels of the layers. Those of one mean rate take exactly the same bits."""
    table = np.stack([error_bounds(kind, [b] * len(LAYERS), pilot).mean((0, 1, 2)) for b in range(1, 9)], 1)
    weights = losses.smoothness[:, None]
    value = weights[:, 0] * table[:, -1] / LAYERS  # of an element's error
    drops = {
        "significance": weights * table,
        "energy": table,
        "opposite": weights * table / (value**2)[:, None],
    }
    sizes = LAYERS[:, None] * np.arange(1, 9)
    found = {f"uniform {b}": (b,) * len(LAYERS) for b in LEVELS}
    for bits in MIXED:
        for name, drop in drops.items():
            plan = exact(drop, sizes, bits * SIZE)
            assert plan.size == bits * SIZE, f"{name}: {plan.size} bits of {bits * SIZE}"
            found[f"{name} {bits}"] = tuple(choice + 1 for choice in plan.choice)
    same = [p for p in product(range(1, 9), repeat=len(LAYERS)) if np.dot(p, LAYERS) == 3 * SIZE]
    for i, j in enumerate(np.random.default_rng(3).choice(len(same), RANDOM, replace=False)):
        found[f"random {i} 3"] = same[j]
    return found


def compared(losses, kind, name, levels, run, exactly):
    """One plan's run beside its bounds, and beside the run without quantization."""
    errors = error_bounds(kind, levels, run) if kind != "none" else np.zeros_like(run.norms)
    problem = losses.problem
    weighted = mean_error(SHARES, errors * losses.smoothness / problem.smoothness)
    visited = Problem(problem.smoothness, run.noise, run.heterogeneity, problem.gap)
    real = mean_error(SHARES, run.errors)
    theorem = bound(losses, problem, mean_error(SHARES, errors))
    measured = float(run.gradients.mean())
    excess = measured - float(exactly.gradients.mean())
    return {
        "plan": name,
        "levels": [int(b) for b in levels],
        "bits": float(np.dot(levels, LAYERS) / SIZE),
        "measured": measured,
        "sd": float(run.gradients.std(ddof=1)),
        "by_seed": run.gradients.tolist(),
        "terms": {key: getattr(theorem, key) for key in ("start", "noise", "drift", "quantization")},
        "theorem": theorem.total,
        "proposition": bound(losses, problem, weighted).total,
        "proposition_quantization": bound(losses, problem, weighted).quantization,
        "visited": bound(losses, visited, weighted).total,
        "ratio": theorem.total / measured,
        "share": theorem.quantization / theorem.total,
        "excess": excess,
        "error_bound_over_error": mean_error(SHARES, errors) / real if real > 1e-12 else None,
    }


def order(rows, which):
    """Spearman's correlation of a bound with the measurements, and of the pairs that differ by more than six standard
    errors (paired by seed), how many it orders as they do."""
    rows = list({tuple(r["levels"]): r for r in rows}.values())  # two names may have come to one plan
    told = right = 0
    for a, b in combinations(rows, 2):
        difference = np.subtract(a["by_seed"], b["by_seed"])
        if abs(difference.mean()) > 6 * difference.std(ddof=1) / len(difference) ** 0.5:
            told += 1
            right += bool((a[which] > b[which]) == (difference.mean() > 0))
    rho = float(spearmanr([r["measured"] for r in rows], [r[which] for r in rows]).statistic)
    return {"spearman": rho, "pairs": told, "right": right, "plans": len(rows)}


def draw(results, file):
    """A panel a problem and quantizer: measured, bound and its terms against the level."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey="row", layout="constrained")
    x = np.arange(len(LEVELS))
    for axis, result in zip(axes.ravel(), results, strict=True):
        rows = {row["plan"]: row for row in result["plans"]}
        even = [rows[f"uniform {b}"] for b in LEVELS]
        axis.plot(x, [r["theorem"] for r in even], "-o", color=COLOURS[0], label="Theorem 1")
        axis.plot(x, [r["visited"] for r in even], "-", color=COLOURS[5], label="Proposition, constants of the path")
        axis.plot(x, [r["terms"]["quantization"] for r in even], "--", color=COLOURS[0], label="quantization term")
        for key, style in (("start", ":"), ("noise", "-."), ("drift", "--")):
            axis.axhline(even[0]["terms"][key], color="0.6", linestyle=style, linewidth=1, label=f"{key} term")
        axis.errorbar(
            x, [r["measured"] for r in even], [r["sd"] for r in even], fmt="-s", color=COLOURS[1], capsize=3,
            label="measured, uniform (± sd)",
        )  # fmt: skip
        for name, mark, shift in (("significance", "v", 0.12), ("energy", "d", 0.24), ("opposite", "^", 0.36)):
            some = [rows[f"{name} {b}"] for b in MIXED]
            axis.errorbar(
                x[1:4] + shift, [r["measured"] for r in some], [r["sd"] for r in some], fmt=mark, color=COLOURS[2],
                label=f"measured, by {name}" if name != "opposite" else "measured, the opposite",
                fillstyle="full" if name == "significance" else "none",
            )  # fmt: skip
        axis.set(
            yscale="log",
            ylim=(1e-4, 2),
            title=f"{result['problem']}, {result['quantizer']}",
            xticks=x,
            xticklabels=LEVELS,
        )
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean squared gradient")
    for axis in axes[1]:
        axis.set_xlabel("bits a parameter, mean over layers")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def rounded(value):
    """Four significant digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit, started, results = provenance.commit(), time.perf_counter(), []
    for losses, problem in ((Quadratic(), "quadratic"), (Logistic(), "logistic")):
        exactly = fedavg(losses, [Float32()] * len(LAYERS), options.seeds)
        pilot = fedavg(losses, [Float32()] * len(LAYERS), options.seeds, seed=1)
        for kind, quantizer in KINDS.items():
            rows = [compared(losses, "none", "float32", (32,) * len(LAYERS), exactly, exactly)]
            for name, levels in plans(losses, kind, pilot).items():
                run = fedavg(losses, [quantizer(b) for b in levels], options.seeds)
                rows.append(compared(losses, kind, name, levels, run, exactly))
            groups = {"levels": [r for r in rows if r["plan"].startswith("uniform")], "all plans": rows[1:]}
            groups |= {f"allocations at {b} bits": [r for r in rows if r["bits"] == b] for b in MIXED}
            bounds = ("theorem", "proposition")
            results.append(
                {
                    "problem": problem,
                    "quantizer": kind,
                    "constants": vars(losses.problem),
                    "smoothness": losses.smoothness.tolist(),
                    "parts": losses.parts(step(losses)) if isinstance(losses, Quadratic) else None,
                    "holds": all(r["measured"] <= r[w] for r in rows for w in (*bounds, "visited")),
                    "holds_for_every_seed": all(max(r["by_seed"]) <= r[w] for r in rows for w in bounds),
                    "order": {name: {w: order(some, w) for w in bounds} for name, some in groups.items()},
                    "plans": rows,
                }
            )
            print(results[-1]["parts"], rows[0]["terms"])
            print(f"{problem}, {kind}: {time.perf_counter() - started:.0f} s", flush=True)
    draw(results, options.out / "bound.png")
    given = {
        "command": f"python experiments/theory/bound.py --seeds {options.seeds}",
        "provenance": {"commit": commit, "machine": provenance.machine(), "versions": provenance.versions()},
        "wall_s": time.perf_counter() - started,
        "setting": {
            "layers": LAYERS.tolist(), "shares": SHARES.tolist(), "rounds": ROUNDS, "local_steps": STEPS,
            "lr": "1 / (8 L local_steps)", "near": NEAR, "seeds": options.seeds,
        },
        "results": results,
    }  # fmt: skip
    (options.out / "results.json").write_text(json.dumps(rounded(given)) + "\n", encoding="utf-8")
    for result in results:
        print(result["problem"], result["quantizer"], result["holds"], result["holds_for_every_seed"])
        for row in result["plans"]:
            print(
                f"| {row['plan']} | {row['levels']} | {row['measured']:.4g} ± {row['sd']:.2g} | {row['theorem']:.4g} | "
                f"{row['ratio']:.1f} | {100 * row['share']:.0f} | {row['proposition']:.4g} | {row['visited']:.4g} | "
                f"{row['error_bound_over_error'] or 0:.2f} | "
                f"{row['terms']['quantization'] / (row['excess'] or 1):.1f} |"
            )
        for name, one in result["order"].items():
            print(name, one)


if __name__ == "__main__":
    main()
