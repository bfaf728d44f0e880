"""Standard output and error; the program that reads them may close them at any time."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click


class OutputClosed(BrokenPipeError):
    """The program that read the output has ended, so the run ended as if interrupted."""


def silence() -> None:
    """Discards output to standard streams that are no longer read; otherwise Python reports an error at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (AttributeError, ValueError):  # there is no such stream, or it is closed
            pass


def say(text: str) -> None:
    """Prints a line to stderr, if it is still read."""
    try:
        click.echo(text, err=True)
    except BrokenPipeError:
        silence()


class Commands(click.Group):
    """Commands that let BrokenPipeError through; click would recognise it by its errno and exit the program."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _unnumbered():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _unnumbered():
            return super().invoke(ctx)


@contextlib.contextmanager
def _unnumbered() -> Iterator[None]:
    try:
        yield
    except OutputClosed:
        raise
    except BrokenPipeError as exc:
        raise BrokenPipeError from exc


def short(value: float) -> str:
    """Three significant digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
