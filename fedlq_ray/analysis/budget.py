"""Quality-under-Budget: the main metric at equal traffic, or at equal simulated time, on the curves that are drawn."""

from collections.abc import Sequence

from fedlq_ray import plots
from fedlq_ray.federation.record import Record

AXES = {"equal_mb": "bytes", "equal_s": "time"}  # by name: the axis of a picture that has the budget


def quality(records: Sequence[Record], against: str, budget: float) -> float | None:
    """The main metric at a budget, linear between two evaluations; None before the first one, and after the last."""
    xs, ys = plots.seen(records, against)
    if not len(xs) or not xs[0] <= budget <= xs[-1]:
        return None
    return float(plots.along((xs, ys), budget))


def largest(runs: Sequence[Sequence[Record]], against: str) -> float | None:
    """The largest budget that all runs were evaluated at; None if one was never evaluated."""
    ends = [plots.seen(records, against)[0] for records in runs]
    return min(float(xs[-1]) for xs in ends) if ends and all(len(xs) for xs in ends) else None
