"""Displays one run in a notebook."""

from html import escape
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from fedlq_ray import plots  # chooses the backend
from fedlq_ray.analysis import svg
from fedlq_ray.problems import goal_of
from fedlq_ray.runs import rundir


def plot(folder: Path) -> Figure:
    """Plots accuracy against simulated time and traffic; the figure is closed in pyplot, so that it is shown once."""
    run = rundir.read(folder)
    config = run.config
    goal = goal_of(config.problem, run.summary)
    figure = plots.accuracy({config.strategy.name: [run.records]}, config.target, config.network.bill, goal=goal)
    pyplot.close(figure)
    return figure


def html(folder: Path) -> str:
    """Returns a run's main results as an HTML table, and its plot."""
    run = rundir.read(folder)
    config, summary = run.config, run.summary or {}
    goal = goal_of(config.problem, summary)
    shown = {"strategy": config.strategy.name, "rounds": str(len(run.records))}
    if summary:
        shown[f"final {goal.metric.replace('_', ' ')}"] = goal.shown(summary[f"final_{goal.metric}"])
        if config.target is not None:
            reached = summary["time_to_target_s"]
            key = f"simulated time to {config.target:.4g}"
            shown[key] = "not reached" if reached is None else f"{reached:.3g} s"
        shown["simulated time"] = f"{summary['sim_time_s']:.3g} s"
        shown["sent by clients"] = f"{summary['uplink_bytes'] / 1e6:.3g} MB"
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in shown.items())
    alt = f"Accuracy of {config.name} against simulated time and traffic"
    drawn = svg.inline(plot(folder), f"{config.name}-{config.seed}", alt, themed=False)
    return (
        f"<table>{rows}</table>"
        f'<div style="max-width: 60em; background: white">{drawn}</div><code>{escape(str(folder))}</code>'
    )
