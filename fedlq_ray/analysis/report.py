"""A report on runs: one HTML file that needs no network, for screens of any width, light or dark, and for print."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from fedlq_ray import plots
from fedlq_ray.analysis import bound, by_client, figures, flights, svg, tables
from fedlq_ray.analysis.compare import CONFIDENCE, Row
from fedlq_ray.analysis.figures import Runs, Shown
from fedlq_ray.analysis.runs import by_population
from fedlq_ray.config.load import WITHOUT_EFFECT, Config, flat
from fedlq_ray.sweeps.sweep import Finished, Outcome, as_text


def page(outcome: Outcome, table: Sequence[Row], unlike: Mapping[str, Sequence[str]], command: str) -> str:
    """Returns the report as HTML.

    Args:
        table: the result of compare.rows.
        unlike: the result of runs.unlike.
        command: the command that reproduces this report.
    """
    config = next(iter(outcome.runs.values()))[0].config
    configs = [runs[0].config for runs in outcome.runs.values()]
    seeds = max(len(runs) for runs in outcome.runs.values())
    title = f"{', '.join(outcome.runs)} on {config.data.name}"
    waits = all(config.synchronous for config in configs)
    cohorts = " or ".join(map(str, sorted({config.clients.cohort for config in configs})))
    rounds = " or ".join(map(str, sorted({config.rounds for config in configs})))
    scale = (
        f"{config.clients.count} clients, {cohorts} {'in a round' if waits else 'under way at a time'}, "
        f"{rounds} {'rounds' if waits else 'steps of the server'}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}, links: {config.clients.profiles}."
    )
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="small">{escape(scale)}</p>']
    for where, labels in by_population(outcome.runs).items():
        runs = {label.removesuffix(f"@{where}"): outcome.runs[label] for label in labels}
        block = [row for row in table if row.run in labels]
        if where:
            parts.append(f"<h2>Population {escape(where)}</h2>")
        parts += _results(block, runs, unlike)
        parts += _behaviour(runs, where)
    first = next((runs[0] for runs in outcome.runs.values() if runs[0].records), None)
    shown = figures.labels(first) if first else None
    if shown:
        parts += ["<h2>Data of each client</h2>", _grid([shown], "labels")]
    parts += _origin(outcome, command)
    style = (files("fedlq_ray.analysis") / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _results(block: Sequence[Row], runs: Runs, unlike: Mapping[str, Sequence[str]]) -> list[str]:
    """Results: sentences, the table, and accuracy against time, bytes and rounds."""
    config = next(iter(runs.values()))[0].config
    waits = all(seeds[0].config.synchronous for seeds in runs.values())
    told = "".join(f"<li>{escape(one)}</li>" for one in findings(block, config.target))
    made = tables.columns(block, config.target)
    names = list(made)
    head = "".join(f"<th scope='col'>{escape(heading)}</th>" for heading in made)
    body = []
    for index, cells in enumerate(zip(*made.values(), strict=True)):
        key = f'<span class="key" style="border-color: var(--run-{index % len(plots.COLOURS)})"></span>'
        row = "".join(
            f'<td data-of="{escape(h)}">{key if h == names[0] else ""}{escape(c)}</td>'
            for h, c in zip(names, cells, strict=True)
        )
        body.append(f"<tr{' class=front' if block[index].front and len(block) > 1 else ''}>{row}</tr>")
    notes = " ".join(tables.notes(block, config, unlike))
    where = block[0].population
    return [
        f"<ul>{told}</ul>",
        f'<div class="scroll"><table class="results"><thead><tr>{head}</tr></thead>',
        f"<tbody>{''.join(body)}</tbody></table></div>",
        f'<p class="small">{escape(notes)}</p>',
        f"<h2>Accuracy against time, traffic and {'rounds' if waits else 'steps'}</h2>",
        _grid([figures.accuracy(runs, against) for against in plots.AXES], f"accuracy{where}"),
    ]


def findings(block: Sequence[Row], target: float | None) -> list[str]:
    """Returns the table's main points as sentences."""
    told, goal = [], block[0].goal
    points = " points" if goal.percent else ""
    base = block[0].reference.removesuffix(f"@{block[0].population}")
    arrived = [(seconds, row) for row in block if (seconds := row.mean("time_to_target_s")) is not None]
    if target is not None and arrived:
        seconds, first = min(arrived, key=lambda one: one[0])
        line = f"{first.name} is the first to reach {goal.named(target)}, after {seconds:.3g} s"
        if first.speed_up is not None and first.name != base:
            line += f": {tables.between(first.speed_up)} times as fast as {base}"
        told.append(line + ".")
    elif target is not None:
        told.append(f"No run reached {goal.named(target)} with every seed.")
    sure = [(row, gain) for row in block if row.name != base and (gain := row.accuracy_gain) and gain.low is not None]
    beyond = [(row, gain) for row, gain in sure if gain.excludes_zero]
    for row, gain in beyond:
        difference = tables.between(gain, goal.scale, 1 if points else 3)
        told.append(f"{row.name} differs from {base} by {difference}{points} at the end.")
    if len(beyond) < len(sure):
        rest = ", ".join(row.name for row, gain in sure if (row, gain) not in beyond)
        seeds = f"{block[0].seeds} seeds do not distinguish {rest} from {base} ({CONFIDENCE:.0%})."
        told.append(f"Final {goal.metric}: {seeds}")
    if closing := [
        (closed.mean, row) for row in block if (closed := row.gap_closed) and row.name not in (base, "limit")
    ]:
        share, best = max(closing, key=lambda one: one[0])
        told.append(f"{best.name} closes {share:.1%} of the gap in time between {base} and the limit.")
    for name, words in (("equal_mb", "MB"), ("equal_s", "simulated seconds")):
        found = [(row, q.gain) for row in block if row.name != base and (q := row.qualities.get(name)) and q.gain]
        ahead = [row.name for row, gain in found if gain.excludes_zero and goal.merit(gain.mean) > 0]
        if ahead:
            told.append(f"Better than {base} at equal {words}: {', '.join(ahead)}.")
    if len(block) > 1:
        front = ", ".join(row.name for row in block if row.front)
        told.append(f"On the front of {goal.metric} against traffic: {front}.")
    return told


def _behaviour(runs: Runs, where: str) -> list[str]:
    """Explanations of the results: bits, significance, stragglers."""
    parts = []
    if fair := by_client.shown(runs):
        parts += ["<h2>Clients that the model serves well or badly</h2>", _grid([fair], f"clients{where}")]
    shown, told = figures.bits(runs)
    if shown or told:
        parts += ["<h2>Bits by layer and client</h2>", *[f"<p>{escape(line)}</p>" for line in told]]
        parts.append(_grid(shown, f"bits{where}"))
    shown = figures.significance(runs)
    if shown:
        parts += ["<h2>Significance by layer</h2>", _grid(shown, f"significance{where}")]
    if flown := flights.shown(runs):
        parts += ["<h2>Clients under way</h2>", _grid(flown, f"flights{where}")]
    if charged := bound.shown(runs):
        parts += ["<h2>Convergence bound against training</h2>", _grid([charged], f"bound{where}")]
    shown = figures.timelines(runs)
    if shown:
        steps = "".join(f'<span class="step" style="background: var(--{step})"></span>{step}' for step in plots.STEPS)
        billed = next(iter(runs.values()))[0].config.network.bill
        free = "" if billed == "both" else " Downloads are not billed here, and take no time."
        parts.append("<h2>Clients that a round waited for, and why</h2>")
        parts.append(f'<p class="small">{steps}.{free} The same round and seed for every run.</p>')
        parts.append(_grid(shown, f"timeline{where}"))
    return parts


def _grid(shown: Iterable[Shown], name: str) -> str:
    made = []
    for index, one in enumerate(shown):
        drawn = svg.inline(one.figure, f"{name}-{index}", one.alt)
        heading, caption = escape(one.title), escape(one.caption)
        made.append(f"<figure><h3>{heading}</h3>\n{drawn}\n<figcaption>{caption}</figcaption></figure>")
    return f'<div class="grid">\n{"".join(made)}\n</div>'


def _origin(outcome: Outcome, command: str) -> list[str]:
    """Settings, versions, and the commands that reproduce the runs and the report."""
    told = {label: flat(runs[0].config) for label, runs in outcome.runs.items()}
    first = next(iter(told.values()))
    every = dict.fromkeys(path for one in told.values() for path in one)
    paths = [
        path for path in every if path != "seed" and not path.startswith(("out", "name", "tracking", "checkpoint"))
    ]
    differing = [path for path in paths if len({json.dumps(one.get(path)) for one in told.values()}) > 1]
    none = "-"  # the scheme does not read it
    head = "".join(f"<th scope='col'>{escape(label)}</th>" for label in told)
    cells = {path: [escape(as_text(one.get(path, none))) for one in told.values()] for path in differing}
    lines = "".join(
        f"<tr><td>{path}</td>{''.join(f'<td>{v}</td>' for v in found)}</tr>" for path, found in cells.items()
    )
    common = "\n".join(f"{path}: {as_text(first.get(path))}" for path in paths if path not in differing)
    parts = ["<h2>Settings, versions, and how to repeat it</h2>"]
    if lines:
        parts.append(
            f'<div class="scroll"><table class="settings"><thead><tr><th>setting</th>{head}</tr></thead>'
            f"<tbody>{lines}</tbody></table></div>"
        )
    parts.append(f"<details><summary>Settings that all share</summary><pre>{escape(common)}</pre></details>")
    parts.append("<p>To repeat the runs:</p>")
    parts.append(f"<pre>{escape(chr(10).join(_again(outcome)))}</pre>")
    parts.append(f"<p>To repeat this report:</p><pre>{escape(command)}</pre>")
    parts.append("<p>Made by:</p><pre>" + escape("\n".join(_made_by(outcome)) or "not recorded") + "</pre>")
    return parts


def repeat(config: Config) -> str:
    """Returns the command that repeats a run, with all settings that differ from the defaults."""
    default = flat(Config.model_validate({"strategy": {"name": config.strategy.name}}))
    changed = {path: value for path, value in flat(config).items() if value != default[path]}
    if config.strategy.name != "fedlq":
        changed = {"strategy.name": config.strategy.name} | changed
    kept = [path for path in changed if path not in WITHOUT_EFFECT]
    return shlex.join(["fedlq", "run", *(f"{path}={as_text(changed[path])}" for path in kept)])


def _again(outcome: Outcome) -> list[str]:
    """Returns the sweep's command and file if the runs belong to a sweep, else one command per run."""
    runs = [run for seeds in outcome.runs.values() for run in seeds]
    lines: list[str] = []
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        file = folder / "table.json"
        if file.exists():
            made = json.loads(file.read_text(encoding="utf-8"))
            lines += [made["command"], "", *made["sweep"].splitlines(), ""]
        else:
            lines += [repeat(run.config) for run in runs if run.folder.parent == folder]
    return lines


def _made_by(outcome: Outcome) -> list[str]:
    """Returns versions, commit and machine, one line per distinct combination."""
    found: dict[str, int] = {}
    for run in (run for seeds in outcome.runs.values() for run in seeds):
        line = _maker(run)
        if line:
            found[line] = found.get(line, 0) + 1
    return [f"{line} ({count} run{'s' if count > 1 else ''})" for line, count in found.items()]


def _maker(run: Finished) -> str | None:
    file: Path = run.folder / "timing.json"
    made = json.loads(file.read_text(encoding="utf-8")).get("made_by") if file.exists() else None
    if made is None:
        return None
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"{versions}; commit {made['commit'] or 'none'}; {made['machine']}"
