"""Standard output and error, which the program that reads them may close at any time."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click
import rich.console


class OutputClosed(BrokenPipeError):
    """The program that read the output has ended, and the run ended as by an interrupt."""


def silence() -> None:
    """Discard what is written to a standard stream that nobody reads: Python would complain when it ends."""
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
    """A line on stderr, if anybody reads it."""
    try:
        click.echo(text, err=True)
    except BrokenPipeError:
        silence()


class Console(rich.console.Console):
    """A terminal, or a file. Where nobody reads it any more, printing raises BrokenPipeError."""

    def on_broken_pipe(self) -> None:
        raise  # rich would end the program


class Commands(click.Group):
    """Commands that let BrokenPipeError through, which click knows by its number and ends the program for."""

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
