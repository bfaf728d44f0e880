"""The `fedlq` command."""

from fedlq_ray import startup  # noqa: F401  (before imports that a user's file could hide)

# isort: split
import atexit
import contextlib
import gc
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedlq_ray.cli import analysis as cli_analysis
from fedlq_ray.cli.arguments import ARGUMENTS, PATH, split
from fedlq_ray.cli.job import job
from fedlq_ray.cli.plan import plan
from fedlq_ray.cli.submit import submit
from fedlq_ray.errors import ConfigError, FedLQError, first_line
from fedlq_ray.hosts.ray import starter
from fedlq_ray.hosts.ray.session import anticipate
from fedlq_ray.runs.output import Commands, OutputClosed, say, silence

if TYPE_CHECKING:
    from fedlq_ray.config.load import Config
    from fedlq_ray.federation.record import Record


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fedlq-ray")
def cli() -> None:
    """Simulate communication-efficient federated learning: clients as Ray actors, quantized layer by layer.

    Start with `fedlq demo` or `fedlq run`; `fedlq config` lists every setting. Exit codes: 0 done, 2 wrong input
    (nothing was written), 1 the run failed, 130 and 143 interrupted, 141 the output was closed (results so far are
    kept).
    """


@cli.command()
@ARGUMENTS
@click.option("--json", "as_json", is_flag=True, help="Print each round's record, then the summary, a JSON line each.")
def run(arguments: tuple[str, ...], as_json: bool) -> None:
    """Run one experiment.

    Settings come from CONFIG.yaml (without it, the defaults, as in the demo) and key=value; later ones override:

        fedlq run rounds=20 strategy.name=uniform strategy.bits=2
    """
    from fedlq_ray.config import load as configuration

    config = configuration.load(*split(arguments))  # before imports that take seconds
    _import_for(config)
    from fedlq_ray.runs.console import Console
    from fedlq_ray.runs.progress import watch
    from fedlq_ray.runs.simulation import simulate

    with watch(config, Console(stderr=True), as_json) as report:
        result = simulate(config, watch=report)
    _tell(result, config, as_json)


@cli.command()
@click.argument("folder", type=PATH, metavar="RUN_DIR")
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--json", "as_json", is_flag=True, help="Print each round's record, then the summary, a JSON line each.")
def resume(folder: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Resume a run that was interrupted, killed, or failed, from its last checkpoint.

    The result is the same as without the interruption. `rounds` may be raised, and settings that cannot change a result
    may differ, such as clients.hosting.
    """
    from fedlq_ray.config import load as configuration
    from fedlq_ray.runs import rundir, simulation

    config = configuration.load(rundir.settings(folder), overrides)
    _import_for(config)
    from fedlq_ray.runs.console import Console
    from fedlq_ray.runs.progress import watch

    with watch(config, Console(stderr=True), as_json) as report:
        result = simulation.resume(folder, overrides, watch=report)
    _tell(result, config, as_json)


def _import_for(config: "Config | None") -> None:
    """Imports what a run needs while the servers for Ray start (None: it may need Ray), and lets them share it."""
    if config and config.clients.hosting == "serial":
        return
    anticipate(workers=False)
    importlib.import_module("fedlq_ray.runs.simulation")
    starter.fork()


def _tell(result: Any, config: "Config", as_json: bool) -> None:
    """Prints the result of a run."""
    if as_json:
        click.echo(json.dumps({"summary": result.summary, "path": str(result.path)}))
        return
    from fedlq_ray.problems import goal_of  # it imports PyTorch

    summary = result.summary
    metric = goal_of(config.problem, summary).metric
    click.echo(
        f"final {metric.replace('_', ' ')} {summary[f'final_{metric}']:.4f} after {summary['rounds']} {config.turn}s, "
        f"{summary['sim_time_s']:.1f} simulated s, {summary['uplink_bytes'] / 1e6:.2f} MB sent by clients"
        + (f", {wasted / 1e6:.2f} MB wasted in both directions" if (wasted := summary.get("wasted_bytes")) else "")
    )
    if config.target is not None:
        reached = summary["time_to_target_s"]
        told = "not reached" if reached is None else f"after {reached:.1f} simulated s"
        click.echo(f"target {config.target:g}: {told}")
    click.echo(f"results in {result.path}" + ("; fedlq ui opens MLflow" if config.tracking.uri else ""))


@cli.command("config")
@ARGUMENTS
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a configuration instead.")
def show_config(arguments: tuple[str, ...], schema: bool) -> None:
    """Print the whole resolved configuration, with each key's meaning, unit and bounds."""
    from fedlq_ray.config import load as configuration

    if schema:
        click.echo(json.dumps(configuration.Config.model_json_schema(), indent=2))
    else:
        click.echo(configuration.to_yaml(configuration.load(*split(arguments)), commented=True), nl=False)


@cli.command()
@click.argument("file", type=PATH)
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option("--out", default=None, type=PATH, help="Folder of the runs; finished runs in it are not repeated.")
@click.option("--only", default="", help="Only these runs: RUN or RUN@POPULATION, separated by commas.")
def sweep(file: str, overrides: tuple[str, ...], out: str | None, only: str) -> None:
    """Run several experiments and compare them.

    FILE has `base` settings, `runs` (a name and a list of key=value each), `seeds`, and optionally `tune`: values to
    try for a setting, such as `train.lr: [0.03, 0.1]`; each run gets the values that do best for it on held-out
    training samples. `tuning` has settings for these trials only, such as `rounds=60`. `populations` (a name and a list
    of key=value each) repeats every run under other settings, as RUN@POPULATION; if populations change only the clock,
    a scheme that ignores time trains once for all of them. `targets` are accuracies for which to report the time. Runs
    with serial or unset hosting run in parallel, as many as cores and memory allow; others run one after another. A run
    that fails is reported, and the others continue.
    """
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    _sweep(Path(file), overrides, Path(out or f"runs/{Path(file).stem}"), names)


@cli.command()
@click.argument("overrides", nargs=-1, metavar="[key=value ...]")
@click.option(
    "--out", default=None, type=PATH, help="Folder of the runs; the default is runs/demo, or the next free runs/demo-N."
)
def demo(overrides: tuple[str, ...], out: str | None) -> None:
    """Compare FedAvg, uniform quantization and FedLQ on real data, with 50 clients on unequal links: about a minute."""
    folder, number = Path(out or "runs/demo"), 1
    while out is None and folder.exists():
        number += 1
        folder = Path(f"runs/demo-{number}")
    _sweep(Path(str(files("fedlq_ray") / "demo.yaml")), overrides, folder)


def _sweep(file: Path, overrides: tuple[str, ...], out: Path, only: tuple[str, ...] = ()) -> None:
    from fedlq_ray.sweeps import sweep as sweeps

    comparison = sweeps.load(file, overrides, only)
    _import_for(None)
    from fedlq_ray.analysis.conclude import conclude
    from fedlq_ray.runs.console import Console
    from fedlq_ray.sweeps import many

    console = Console(stderr=True)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    outcome = sweeps.run(comparison, out, many.starter(console), tell)
    found = conclude(outcome, out, file.read_text(encoding="utf-8"), cli_analysis.command())
    cli_analysis.show(found.table, outcome)
    if found.failure:
        click.echo(found.failure, err=True)
    first = next(iter(outcome.runs.values()))[0].config
    click.echo(f"plot: {', '.join(map(str, found.pictures))}, table: {out}/table.json, report: {out}/report.html")
    if first.tracking.uri:
        click.echo(f"the runs in MLflow: {Path(sys.argv[0]).parent}/fedlq ui")
    if outcome.failed:
        raise FedLQError(f"{outcome.failed} of the sweep's runs; repeat the command to retry them")


@cli.command()
@ARGUMENTS
@click.option("--out", default="layers.png", type=PATH, help="File of the heat map.", show_default=True)
def layers(arguments: tuple[str, ...], out: str) -> None:
    """Train `rounds` rounds of FedAvg, then report what each layer saves and costs at each level.

    The loss rise is the mean cost of rounding, with its standard error over samples and rounding; the significance is
    the rise per memory saved, in parentheses if the rise is below twice its error.
    """
    from rich.table import Table

    from fedlq_ray import plots
    from fedlq_ray.analysis.layers import analyse
    from fedlq_ray.config import load as configuration
    from fedlq_ray.problems import goal_of
    from fedlq_ray.runs.console import Console

    config = configuration.load(*split(arguments))
    plots.require_file(Path(out))

    def watch(record: "Record") -> None:
        done = record.round + 1
        click.echo(f"round {done}/{config.rounds}  train loss {record.train_loss or 0:.4f}", err=True)
        if done == config.rounds:
            click.echo("quantizing each layer at each level", err=True)

    found = analyse(config, watch)
    goal = goal_of(config.problem)
    before = f"loss {found.before.loss:.4f}, {goal.metric} {goal.shown(found.before.metrics[goal.metric])}"
    table = Table(title=f"payload {found.payload}; {found.samples} held-out samples: {before}")
    worse = "acc. drop" if goal.metric == "accuracy" else "worse by"
    for heading in ("layer", "parameters", "bits", "saved", "loss rise", "± noise", worse, "significance"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", no_wrap=True)
    for row, name in enumerate(found.names):
        for column, bits in enumerate(found.levels):
            significance = f"{found.significance[row, column]:.2e}"
            table.add_row(
                "" if column else name,
                "" if column else f"{found.sizes[row]:,}",
                str(bits),
                f"{found.saving[row, column]:.2%}",
                f"{found.loss.drop[row, column]:.2e}",
                f"{found.loss.noise[row, column]:.1e}",
                f"{found.accuracy.drop[row, column]:{'+.2%' if goal.percent else '+.3g'}}",
                f"{significance} " if found.seen[row, column] else f"({significance})",
                end_section=column + 1 == len(found.levels),
            )
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=120)).print(table)
    for column, bits in enumerate(found.levels):
        order = [row for row in found.significance[:, column].argsort()[::-1] if found.seen[row, column]]
        ranked = ", ".join(f"{found.names[row]} {found.significance[row, column]:.1e}" for row in order)
        click.echo(f"{bits} bit{'s' if bits > 1 else ''}, most significant first: {ranked or 'nothing but noise'}")
    panel = plots.Panel(f"after {found.rounds} rounds, payload {found.payload}", found.significance, found.seen)
    plots.layers([[panel]], found.names, found.levels, "loss rise per memory saved\n(grey: only noise)", Path(out))
    click.echo(f"heat map: {out}")


@cli.command()
@click.argument("where", required=False, type=PATH, metavar="[RUN_DIR | STORE]")
@click.option("--port", default=5000, show_default=True)
def ui(where: str | None, port: int) -> None:
    """Open MLflow's UI on the store that the runs used.

    The store is that of RUN_DIR, or STORE (such as sqlite:///mlflow.db); by default it is that of the newest run in
    runs/, or else mlflow.db in this folder.
    """
    from fedlq_ray.tracking import stores

    store = _store(where)
    if store.startswith(("http://", "https://", "databricks")):
        click.echo(f"the runs are on {store}")
        return
    click.echo(f"MLflow on http://127.0.0.1:{port} with {store} (Ctrl-C stops it)")
    options = {"backend-store-uri": stores.for_mlflow(store), "host": "127.0.0.1", "port": str(port), "workers": "1"}
    server = ["server", *(word for name, value in options.items() for word in (f"--{name}", value))]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *server])  # so that signals reach the server itself


def _store(where: str | None) -> str:
    """Returns the MLflow store of a run's folder, of an address, or of the newest run in the working directory."""
    from fedlq_ray.config.load import Config
    from fedlq_ray.runs import rundir
    from fedlq_ray.tracking import stores

    if where and "://" in where:
        stores.require_usable(where, "", stores.Names("STORE"))
        store = stores.absolute(where)
    else:
        newest = max(Path("runs").rglob("tracking.json"), key=lambda file: file.stat().st_mtime, default=None)
        folder = Path(where) if where else newest.parent if newest else None
        tracking = rundir.read(folder).tracking if folder else None
        if where and tracking is None:
            raise ConfigError(f"{where}: was run without tracking (tracking.uri=null)")
        store = tracking.uri if tracking else stores.absolute(Config().tracking.uri or "")
    file = stores.sqlite_file(store)
    if file and not file.is_file():
        raise ConfigError(f"{file}: no such MLflow store; a run with tracking creates it; or name one: fedlq ui STORE")
    return store


@cli.command()
@click.argument("folder", type=PATH, metavar="RUN_DIR")
@click.option("--uri", default=None, help="Another store or server than the run's; later syncs use it as well.")
@click.option("--experiment", default=None, help="Another experiment of MLflow; later syncs use it as well.")
def sync(folder: str, uri: str | None, experiment: str | None) -> None:
    """Log a run's folder to MLflow, for example after its server was down; safe to repeat."""
    from fedlq_ray.models import build
    from fedlq_ray.runs import rundir
    from fedlq_ray.tracking import log as tracking
    from fedlq_ray.tracking import stores

    found = rundir.read(folder)
    where = found.tracking
    if where is None:
        raise ConfigError(f"{folder}: was run without tracking (tracking.uri=null)")
    where = replace(where, uri=stores.absolute(uri or where.uri), experiment=experiment or where.experiment)
    stores.require_usable(where.uri, where.experiment, stores.Names("--uri", "--experiment"))
    module = None
    if found.summary and where.dataset and found.config.tracking.log_model:
        profile, model = json.loads(where.dataset["profile"]), found.config.model
        try:
            module = build(
                model.name, tuple(profile["input_shape"]), profile["num_classes"], dict(model.args),
                vocabulary=profile.get("vocabulary", 0), output_shape=tuple(profile.get("output_shape", ())) or None,
            )  # fmt: skip
        except ConfigError as exc:
            click.echo(f"the model is not logged: {exc}", err=True)
    try:
        run_id = tracking.sync(where, found.config, found.records, found.status, Path(folder), module)
    except Exception as exc:  # MLflow raises many kinds
        raise FedLQError(f"MLflow at {where.uri} failed: {first_line(exc)}") from exc
    rundir.redirect(Path(folder), uri, experiment)
    click.echo(f"{len(found.records)} rounds of {folder} are in {where.uri}, run {run_id}")


cli.add_command(submit)
cli.add_command(job)
cli.add_command(plan)
for command in cli_analysis.COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Entry point: errors become one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            stream.reconfigure(errors="replace")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # else it warns at length if the home is not writable
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    atexit.register(gc.freeze)  # else Python's last collection visits all that was imported, which takes seconds
    try:
        _require_sane(sys.argv[1:])
        code: Any = cli(standalone_mode=False) or 0
    except ConfigError as exc:
        say(f"error: {exc}")
        code = 2
    except click.ClickException as exc:
        with contextlib.suppress(BrokenPipeError):
            exc.show()
        code = 2
    except FedLQError as exc:
        say(f"failed: {exc}")
        code = 1
    except BrokenPipeError as exc:
        if isinstance(exc, OutputClosed):
            say("the output was closed; results so far are kept: `fedlq resume RUN_DIR` or the same sweep continues")
        code = 141
    except (KeyboardInterrupt, click.Abort) as exc:
        say("interrupted; results so far are kept: `fedlq resume RUN_DIR` or the same sweep continues")
        cause = exc.__cause__ if isinstance(exc, click.Abort) else exc  # click wraps KeyboardInterrupt
        code = 143 if type(cause).__name__ == "Terminated" else 130
    if ray := sys.modules.get("ray"):
        ray.shutdown()  # at exit it would wait for logs that nobody reads
    silence()
    sys.exit(code)


def _require_sane(arguments: Sequence[str]) -> None:
    """Raises ConfigError if the working directory was removed, or an argument is not text that a file could hold."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the working directory was removed; run fedlq in a folder that exists") from None
    for argument in arguments:
        if argument != argument.encode(errors="replace").decode():
            raise ConfigError(f"{os.fsencode(argument)!r}: is not text in {sys.getfilesystemencoding()}")


if __name__ == "__main__":
    main()
