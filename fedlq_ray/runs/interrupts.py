"""Turns SIGINT, SIGTERM and a closed output into a request that a run end at its next payload."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from fedlq_ray.runs.output import OutputClosed, silence


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: like an interrupt, with another exit code."""


class Interrupts:
    """Handles SIGINT and SIGTERM: the first is only noted, and the run ends at its next payload; a second interrupts.

    Enter it after ray.init, which sets its own handlers; it has no effect outside the main thread.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Notes closed output in the same way as an interrupt."""
        try:
            yield
        except BrokenPipeError:
            silence()
            self.received = self.received or signal.SIGPIPE

    def pass_on(self) -> None:
        """Raises the noted interrupt as an exception, if there is one."""
        if self.received is not None:
            kinds: dict[int, type[BaseException]] = {signal.SIGTERM: Terminated, signal.SIGPIPE: OutputClosed}
            raise kinds.get(self.received, KeyboardInterrupt)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
