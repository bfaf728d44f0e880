"""Learning problems: what clients train for, by name or as a user's own."""

from collections.abc import Mapping
from typing import Any

from fedlq_ray.config import parts
from fedlq_ray.errors import ConfigError
from fedlq_ray.problems.base import Goal, Problem, score
from fedlq_ray.problems.builtin import PADDING, PROBLEMS, Classification, MultiLabel, Regression, Tokens

__all__ = [
    "PADDING", "PROBLEMS", "Classification", "GivenProblem", "Goal", "MultiLabel", "Problem", "Regression", "Tokens",
    "find", "goal_of", "score",
]  # fmt: skip

GivenProblem = Problem | type[Problem] | str


def find(given: GivenProblem) -> Problem:
    """Returns a problem by name or import path, or the given one.

    Raises:
        ConfigError: there is none of this name, or it is not a `Problem` with a main metric.
    """
    found = parts.find("problem", given, PROBLEMS) if isinstance(given, str) else given
    found = parts.call("problem", found, {}, {}) if isinstance(found, type) or callable(found) else found
    if not isinstance(found, Problem):
        raise ConfigError(
            f"problem: {found!r} is not a fedlq_ray.problems.Problem; derive from it, or from Classification"
        )
    if not isinstance(found.goal, Goal) or not found.goal.metric:
        raise ConfigError(f"problem: {type(found).__name__} has no main metric; set its attribute goal to a Goal")
    return found


def goal_of(name: str, summary: Mapping[str, Any] | None = None) -> Goal:
    """The main metric of a run: as its summary says, or that of the built-in problem of this name."""
    if summary and "goal" in summary:
        return Goal(**summary["goal"])
    return PROBLEMS[name].goal if name in PROBLEMS else Goal()
