"""How the rounds call a strategy: mistakes of a user's strategy become one message, and its random draws repeat."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fedlq_ray.errors import FedLQError
from fedlq_ray.seeding import seeded
from fedlq_ray.training.local import Plan
from fedlq_ray.training.payloads import MEMORIES, PAYLOADS


def asked(strategy: Any, seed: int, method: str, round: int, *arguments: Any, keys: tuple[int, ...] = ()) -> Any:
    """Calls a strategy's method and checks what it returns. Global generators are seeded by method, round and `keys`.

    Raises:
        FedLQError: the method raised, or returned a wrong value; the message names round, class and method.
    """
    where = f"round {round}: {type(strategy).__name__}.{method}"
    try:
        with seeded(seed, f"strategy.{method}", round, *keys):
            found = getattr(strategy, method)(*arguments)
    except FedLQError:
        raise
    except Exception as exc:  # a user's strategy may raise anything; the host handles Ray's own errors
        if type(exc).__module__.startswith("ray."):
            raise
        raise FedLQError(f"{where} failed: {type(exc).__name__}: {exc}") from exc
    wrong = _WRONG[method](found, *arguments) if method in _WRONG else ""
    if wrong:
        raise FedLQError(f"{where} {wrong}")
    return found


def _wrong_plans(plans: Any, state: Any, round: int, cohort: Any) -> str:
    if not isinstance(plans, Mapping):
        return f"returned a {type(plans).__name__}, but must return a dict of plans by client"
    kinds = {client: type(plan).__name__ for client, plan in plans.items() if not isinstance(plan, Plan)}
    for client, kind in kinds.items():
        return f"returned a {kind} for client {client}; it must return a Plan"
    for client, plan in plans.items():
        if plan.payload not in PAYLOADS or plan.error_feedback not in MEMORIES:
            what = f"payload={plan.payload!r}, error_feedback={plan.error_feedback!r}"
            return f"gave client {client} {what}; payloads are update and model, error_feedback a bool, ef21 or cafe"
        if plan.weight is not None and not (isinstance(plan.weight, int | float) and 0 < plan.weight < math.inf):
            return f"gave client {client} the weight {plan.weight!r}; it must be above 0 and finite, or None"
    return ""


def _wrong_state(found: Any, state: Any, round: int, result: Any) -> str:
    if type(found) is type(state):
        return ""
    return f"returned a {type(found).__name__}; it must return the next state, a {type(state).__name__} as before"


def _wrong_update(found: Any, state: Any, update: Tensor) -> str:
    if isinstance(found, Tensor) and found.shape == update.shape and found.dtype == update.dtype:
        return ""
    what = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    return f"must return a tensor {tuple(update.shape)} {update.dtype}, and returned {what}"


def _wrong_report(report: Any, state: Any) -> str:
    try:
        json.dumps(dict(report), allow_nan=False)
    except (TypeError, ValueError) as exc:
        return f"must return plain finite numbers, text, lists and dicts by name: {exc}"
    return ""


_WRONG: dict[str, Callable[..., str]] = {
    "plan": _wrong_plans,
    "learn": _wrong_state,
    "combine": _wrong_update,
    "report": _wrong_report,
}
