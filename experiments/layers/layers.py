"""What each layer saves and costs at each level, early and late in training, for three models.

FedAvg in this process; at some rounds every layer alone is quantized at every level, of the mean update and of the
model, on samples held out of training: the measured loss rise and accuracy drop with their noise, and Fisher's
prediction of the rise. Each model's results replace its own in results.json, and its picture.

    python experiments/layers/layers.py cnn
    python experiments/layers/layers.py resnet8_gn vgg9 --cifar cifar.npz
    python experiments/layers/layers.py --draw
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from fedlq_ray import plots
from fedlq_ray.analysis.layers import LayerAnalysis, analyses
from fedlq_ray.config.load import load
from fedlq_ray.federation.record import Record
from fedlq_ray.runs import provenance

HERE = Path(__file__).parent
SETTINGS = [
    "clients.hosting=serial", "clients.count=50", "clients.cohort=10", "data.partition=dirichlet", "data.alpha=0.3",
    "train.local_epochs=1", "strategy.quantizer=minmax", "tracking.uri=null",
]  # fmt: skip
MODELS = {
    "cnn": (
        ["data.name=fashion-mnist", "train.max_samples=300", "train.batch_size=32", "train.lr=0.2"],
        ["strategy.levels=[1,2,3,4,6,8]", "strategy.probe_samples=1024"],
        (5, 40),
    ),
    "resnet8_gn": (
        ["train.max_samples=300", "train.batch_size=32", "train.lr=0.1"],
        ["strategy.levels=[1,2,3,4,6,8]", "strategy.probe_samples=512"],
        (5, 80),
    ),
    "vgg9": (
        ["train.max_samples=100", "train.batch_size=8", "train.lr=0.01", "train.momentum=0.9", "train.max_grad_norm=2"],
        ["strategy.levels=[1,2,4,8]", "strategy.probe_samples=128"],
        (5, 20),
    ),
}
PAYLOADS = ("update", "model")
TABLE = (1, 2)  # levels whose ratios are told


def measured(name: str, cifar: str | None) -> dict:
    """One model's training and its tables."""
    own, levels, rounds = MODELS[name]
    settings = [*SETTINGS, f"model.name={name}", *own, *levels]
    if name != "cnn":
        settings.append("data.name=npz" if cifar else "data.name=cifar10")
    losses, tables, started = [], [], time.perf_counter()

    def watch(record: Record) -> None:
        losses.append(record.train_loss)
        print(f"{name}, round {record.round + 1}: {losses[-1]:.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    config = load(None, settings + ([f"data.path={cifar}"] if cifar and name != "cnn" else []))
    for found in analyses(config, rounds, PAYLOADS, ("fisher",), watch):
        tables.append(table(found))
        took = time.perf_counter() - started
        print(
            f"{name}, {found.payload} measured, accuracy {found.before.metrics['accuracy']:.3f}: {took:.0f} s",
            flush=True,
        )
    return {
        "settings": settings,
        "wall_s": time.perf_counter() - started,
        "layers": list(found.names),
        "parameters": list(found.sizes),
        "levels": list(found.levels),
        "samples": found.samples,
        "train_loss": losses,
        "saving": found.saving,
        "tables": tables,
    }


def table(found: LayerAnalysis) -> dict:
    return {
        "rounds": found.rounds,
        "payload": found.payload,
        "before": {"loss": found.before.loss, "accuracy": found.before.metrics["accuracy"]},
        "loss": found.loss.drop,
        "loss_noise": found.loss.noise,
        "accuracy": found.accuracy.drop,
        "accuracy_noise": found.accuracy.noise,
        "fisher": found.predicted["fisher"].drop,
    }


def rounded(value):
    """Three significant digits, all the way down; figures of settings and provenance stay."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def arrays(one: dict, given: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Measured significance, where it is beyond twice its noise, and Fisher's."""
    saving, loss = np.array(given["saving"]), np.array(one["loss"])
    return loss / saving, np.abs(loss) > 2 * np.array(one["loss_noise"]), np.array(one["fisher"]) / saving


def draw(name: str, given: dict, file: Path) -> None:
    rows = []
    for payload in PAYLOADS:
        chosen = [one for one in given["tables"] if one["payload"] == payload]
        row = []
        for kind in ("measured", "Fisher"):
            for one in chosen:
                significance, seen, fisher = arrays(one, given)
                title = f"{payload}, {one['rounds']} rounds, {kind}"
                row.append(plots.Panel(title, *((significance, seen) if kind == "measured" else (fisher,))))
        rows.append(row)
    title = f"{name}: loss rise per memory saved; colours by rank in each map, none within twice the noise"
    plots.layers(rows, given["layers"], given["levels"], title, file)
    with Image.open(file) as image:  # a quarter of the bytes
        image.convert("RGB").quantize(64).save(file, optimize=True)


def tell(name: str, given: dict) -> None:
    """Markdown: the most and the least significant layers at a level, and their ratio."""
    print(f"\n### {name}")
    for one in given["tables"]:
        if one["payload"] == PAYLOADS[0]:
            print(f"{one['rounds']} rounds: loss {one['before']['loss']}, accuracy {one['before']['accuracy']}")
    print("| payload | rounds | bits | beyond noise | most | least | ratio | by size | Fisher: most | least | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for payload in PAYLOADS:
        for one in (one for one in given["tables"] if one["payload"] == payload):
            significance, seen, fisher = arrays(one, given)
            for bits in TABLE:
                column = given["levels"].index(bits)
                cells = [f"{seen[:, column].sum()} of {len(seen)}"]
                cells += extremes(significance[:, column], seen[:, column], given)
                cells += extremes(fisher[:, column], np.ones(len(fisher), bool), given)[:3]
                print(f"| {payload} | {one['rounds']} | {bits} | {' | '.join(cells)} |")
    print("| payload | bits | seen | below zero | late / early | Fisher: late / early | Fisher: rank correlation |")
    for payload in PAYLOADS:
        early, late = (arrays(one, given) for one in given["tables"] if one["payload"] == payload)
        for column, bits in enumerate(given["levels"]):
            both = early[1][:, column] & late[1][:, column]
            cells = [
                f"{early[1][:, column].sum()}, {late[1][:, column].sum()}",
                f"{(early[1] & (early[0] < 0))[:, column].sum()}, {(late[1] & (late[0] < 0))[:, column].sum()}",
                f"{np.median((late[0] / early[0])[both, column]):.2g} of {both.sum()}" if both.any() else "",
                f"{np.median((late[2] / early[2])[:, column]):.2g}",
                f"{spearmanr(early[2][:, column], late[2][:, column]).statistic:.2f}",
            ]
            print(f"| {payload} | {bits} | {' | '.join(cells)} |")


def extremes(values: np.ndarray, seen: np.ndarray, given: dict) -> list[str]:
    """The most and the least significant layer, their ratio, and that of their sizes (what equal rises would make)."""
    order = [i for i in np.argsort(values) if seen[i] and values[i] > 0]
    if len(order) < 2:
        return ["", "", "", ""]
    least, most = order[0], order[-1]
    sizes, names = given["parameters"], given["layers"]
    told = [f"{names[i]} {plots.short(values[i])}" for i in (most, least)]
    return [*told, *(f"{float(f'{x:.2g}'):,g}" for x in (values[most] / values[least], sizes[least] / sizes[most]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--cifar", help="CIFAR-10 as an npz; by default where data.name=cifar10 looks")
    parser.add_argument("--draw", action="store_true", help="pictures and tables of the results that are there")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(unknown)}")
    file = options.out / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in options.models:
        path = " --cifar cifar.npz" if options.cifar and name != "cnn" else ""
        made = {
            "command": f"python experiments/layers/layers.py {name}{path}",
            "commit": provenance.commit(),
            "machine": provenance.machine(),
            "versions": provenance.versions(),
        }
        results[name] = {"provenance": made, **rounded(measured(name, options.cifar))}
        file.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")
    for name in results if options.draw else options.models:
        draw(name, results[name], options.out / f"{name}.png")
        tell(name, results[name])


if __name__ == "__main__":
    main()
