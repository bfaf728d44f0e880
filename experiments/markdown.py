"""The table of a folder's README, from a sweep's table.json: python experiments/markdown.py RESULTS.json"""

import json
import sys
from pathlib import Path
from typing import Any

OURS = ("fedlq", "ecsq", "limit", "rd", "fedavg")  # runs of these names are not published baselines

Row = dict[str, Any]


def text(value: float | None, spread: float | None = None, scale: float = 1.0) -> str:
    """Three significant digits, and the spread to the same place."""
    if value is None:
        return "–"
    places = max(0, 2 - len(str(int(abs(scale * value)))) + 1) if abs(scale * value) >= 1 else 3
    return f"{scale * value:.{places}f}" + ("" if spread is None else f" ± {scale * spread:.{places}f}")


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def table(rows: list[Row], targets: list[str]) -> list[str]:
    """A markdown table of one population."""
    times: dict[str, dict[str, float | None]] = {r["run"]: {t: r["targets"][t]["mean"] for t in targets} for r in rows}
    judged = targets[1] if len(targets) > 1 else targets[0] if targets else None

    def of(prefix: str) -> float | None:
        return next((times[r["run"]][judged] for r in rows if judged and r["run"].split("@")[0] == prefix), None)

    published = [
        time for name, by in times.items() if judged and (time := by[judged]) is not None and not name.startswith(OURS)
    ]
    best = min(published, default=None)
    heads = ["run", "final accuracy, %"]
    if judged:
        heads += [f"s to {float(t):.1%}" for t in targets] + [f"MB up to {float(judged):.1%}"]
        heads += ["× FedAvg", "× best published", "times the limit"]
    else:
        heads += ["MB up"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        failed = f" ({row['failed']} of {row['seeds']} diverged)" if row["failed"] else ""
        cells = [row["run"].split("@")[0], text(row["final_accuracy"], row["final_accuracy_sd"], 100) + failed]
        if judged:
            own = times[row["run"]][judged]
            cells += [text(row["targets"][t]["mean"], row["targets"][t]["sd"]) for t in targets]
            cells += [text(row["targets"][judged]["mb"])]
            cells += [text(ratio(of("fedavg"), own)), text(ratio(best, own)), text(ratio(own, of("limit")))]
        else:
            cells += [text(row["uplink_mb"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(file: str) -> None:
    rows: dict[str, Row] = {row["run"]: row for row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"]}
    populations = dict.fromkeys(name.partition("@")[2] for name in rows)
    targets = list(next(iter(rows.values()))["targets"])
    for population in populations:
        block = [row for name, row in rows.items() if name.partition("@")[2] == population]
        print("\n".join([f"**{population}**", ""] * bool(population) + table(block, targets) + [""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
