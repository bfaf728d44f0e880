"""What a sweep leaves in its folder and in MLflow: table.json, pictures, report.html, and a note with the table."""

from dataclasses import dataclass
from pathlib import Path

from fedlq_ray.analysis import compare, report, tables
from fedlq_ray.analysis.compare import Row
from fedlq_ray.analysis.runs import unlike
from fedlq_ray.errors import first_line
from fedlq_ray.runs import rundir
from fedlq_ray.sweeps.sweep import Outcome
from fedlq_ray.tracking import log


@dataclass(frozen=True)
class Conclusion:
    """The rows of the comparison, the pictures, and why MLflow has no note of it, or None."""

    table: list[Row]
    pictures: list[Path]
    failure: str | None


def conclude(outcome: Outcome, out: Path, source: str, command: str) -> Conclusion:
    """Write a sweep's results.

    Args:
        out: the sweep's folder.
        source: the text of the sweep, for table.json.
        command: what repeats it.
    """
    out.mkdir(parents=True, exist_ok=True)  # all runs may have failed before they created their folders
    table = compare.rows(outcome)
    compare.save(table, source, command, out / "table.json")
    pictures = compare.plot(outcome, out / "accuracy.png")
    shown = out.name if out.is_absolute() else out  # the report may be moved
    page = report.page(outcome, table, unlike(outcome), f"fedlq report {shown} --out report.html")
    (out / "report.html").write_text(page, encoding="utf-8")
    return Conclusion(table, pictures, _note(outcome, out, table, pictures))


def _note(outcome: Outcome, out: Path, table: list[Row], pictures: list[Path]) -> str | None:
    """Log the table, the pictures and the report to MLflow; what went wrong, or None."""
    runs = [r for seeds in outcome.runs.values() for r in seeds if (r.folder / "config.yaml").exists()]
    where = next((kept for run in runs if (kept := rundir.read(run.folder).tracking) and kept.parent), None)
    if where is None:
        return None
    configs = {label: seeds[0].config for label, seeds in outcome.runs.items()}
    note = tables.written(table, configs, unlike(outcome), "markdown")
    try:
        log.conclude(where, note, [*pictures, out / "table.json", out / "report.html"])
    except Exception as exc:  # telemetry: the runs themselves are saved
        return f"MLflow at {where.uri} has no summary of this sweep: {first_line(exc)}"
    return None
