"""Texts as tokens: one per character, in windows of equal length."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlq_ray.errors import ConfigError
from fedlq_ray.problems import PADDING

Tokens = NDArray[np.int64]


def windows(tokens: Tokens, length: int) -> tuple[Tokens, Tokens]:
    """Cuts a text (n,) into inputs and targets (ceil((n - 1) / length), length): a target is the token after its input.

    The last window is filled with zeros, and its targets with -1, which is not scored.
    """
    count = -(-(len(tokens) - 1) // length)
    x, y = np.zeros(count * length, np.int64), np.full(count * length, PADDING)
    x[: len(tokens) - 1], y[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return x.reshape(count, length), y.reshape(count, length)


def speeches(text: str) -> dict[str, list[str]]:
    """Each speaker's lines, in their order. `NAME:` on a line of its own starts a speech, and an empty line ends it."""
    found: dict[str, list[str]] = {}
    speaker = None
    for line in text.splitlines():
        if not line:
            speaker = None
        elif speaker is None and line.endswith(":"):
            speaker = line[:-1]
        elif speaker is not None:
            found.setdefault(speaker, []).append(line + "\n")
    return found


def shakespeare(path: str | None, length: int = 80) -> dict[str, Any]:
    """Plays of Shakespeare (public domain): the next character, with the last fifth of a speaker's lines to test on.

    Args:
        path: another text in this form, plain or gzipped; None: the package's.
        length: characters per sample.
    Raises:
        ConfigError: the file cannot be read, or has no speakers.
    """
    file = Path(path) if path else Path(__file__).with_name("shakespeare.txt.gz")
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode()
    except (OSError, EOFError, ValueError) as exc:
        raise ConfigError(f"data.path: {file}: cannot be read as text ({exc})") from exc
    spoken = speeches(text)
    if not spoken:
        raise ConfigError(f"data.path: {file}: has no speeches; `NAME:` on a line of its own starts one")
    if length < 1:
        raise ConfigError(f"data.args: length must be 1 or more, got {length}")
    found = sorted({letter for lines in spoken.values() for line in lines for letter in line})
    letters = {letter: token for token, letter in enumerate(found)}
    names = [f"{kind}_{part}" for kind in ("x", "y", "clients") for part in ("train", "test")]
    arrays: dict[str, list[Any]] = {name: [] for name in names}
    for speaker, lines in spoken.items():
        cut = len(lines) - len(lines) // 5
        for part, own in (("train", lines[:cut]), ("test", lines[cut:])):
            tokens = np.array([letters[c] for c in "".join(own)], np.int64)
            if len(tokens) > 1:
                x, y = windows(tokens, length)
                arrays[f"x_{part}"].append(x)
                arrays[f"y_{part}"].append(y)
                arrays[f"clients_{part}"].append(np.full(len(x), speaker))
    return {name: np.concatenate(pieces) for name, pieces in arrays.items()}
