"""The main metric per client of the test samples, where they have clients."""

from statistics import fmean

from matplotlib import pyplot as plt

from fedlq_ray import plots
from fedlq_ray.analysis.figures import STYLE, Runs, Shown, canvas
from fedlq_ray.problems import goal_of


def shown(runs: Runs) -> Shown | None:
    """Draws the first finished seed of each run; None if no run has test samples of clients."""
    first = next(iter(runs.values()))[0]
    goal = goal_of(first.config.problem, first.summary)
    found = {}
    for label, seeds in runs.items():
        values = [plots.test_clients(run.folder, goal) for run in seeds if run.summary]
        if values and values[0]:
            found[label] = values[0]
    if not found:
        return None
    with plt.rc_context(STYLE):
        figure, axis = canvas(4.0)
        plots.draw_clients(axis, found, goal)
    told = "; ".join(
        f"{label}: mean {goal.shown(fmean(values))}, worst tenth {goal.shown(fmean(goal.worst(values)))}"
        for label, values in found.items()
    )
    count = len(next(iter(found.values())))
    name = goal.metric.replace("_", " ")
    caption = (
        f"The final model on each client's own test samples, {count} clients, one seed. Dotted: mean over clients. "
        "Thick: mean over the worst tenth."
    )
    return Shown(f"{name.capitalize()} per client: {told}", caption, f"{name} per client, sorted: {told}.", figure)
