"""When clients are available. Each answer is a function of client and time alone, however often it is asked."""

import math
from typing import Protocol


class Availability(Protocol):
    """Each client's times, in simulated seconds."""

    def leaves_s(self, client: int, at_s: float) -> float:
        """When a client that is available at `at_s` stops being so; `at_s` or less if it is not available."""
        ...

    def returns_s(self, client: int, at_s: float) -> float:
        """The first time from `at_s` on at which a client is available; inf if there is none."""
        ...


class Always:
    """All clients are available at any time."""

    def leaves_s(self, client: int, at_s: float) -> float:
        return math.inf

    def returns_s(self, client: int, at_s: float) -> float:
        return at_s
