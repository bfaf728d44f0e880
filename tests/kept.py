"""A strategy and its state together, as a test of its formulas sees them round after round."""

import inspect
from functools import partial
from typing import Any


class Kept:
    """Passes the state to the strategy's methods, and keeps the one that `learn` returns."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.state = strategy, strategy.init()

    def learn(self, *arguments: Any) -> None:
        self.state = self.strategy.learn(self.state, *arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("strategy", "state"):  # while it is unpickled
            raise AttributeError(name)
        if hasattr(self.state, name):
            return getattr(self.state, name)
        found = getattr(self.strategy, name)
        takes_state = callable(found) and {"state", "seen"} & set(inspect.signature(found).parameters)
        return partial(found, self.state) if takes_state else found
