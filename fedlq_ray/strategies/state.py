"""Converts a strategy's state to plain values for checkpoints, and back."""

import copy
import dataclasses
from typing import Any


def plain(state: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a state, with dataclasses as dicts of their fields."""
    memo = {} if memo is None else memo
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return {field.name: plain(getattr(state, field.name), memo) for field in dataclasses.fields(state)}
    return copy.deepcopy(state, memo)


def restored(initial: Any, saved: Any) -> Any:
    """The state from which `plain` made `saved`.

    Args:
        initial: what the strategy's `init` returns; gives the types, and the values missing from `saved`.
    """
    if dataclasses.is_dataclass(initial) and not isinstance(initial, type):
        names = [field.name for field in dataclasses.fields(initial) if field.name in saved]
        found = {name: restored(getattr(initial, name), saved[name]) for name in names}
        return dataclasses.replace(initial, **found)
    stateless = initial is None and isinstance(saved, dict) and not saved  # the format of earlier versions
    return None if stateless else saved
