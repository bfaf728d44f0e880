"""Docstrings are plain text with code in `backticks`: what Markdown would take for more is escaped, for griffe."""

import re
from typing import Any

import griffe


def as_markdown(text: str) -> str:
    """Signs that stand for themselves, lists as lists, and each of Source, Departs from it and Body a paragraph."""
    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [re.sub(r"([*\\])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    lines: list[str] = []
    for line in "".join(parts).split("\n"):
        starts = line.startswith(("Source:", "Departs from it:", "Body:"))
        listed = line.startswith("- ") and lines and not lines[-1].startswith(("- ", "  "))
        lines += ["", line] if starts or listed else [line]
    return "\n".join(lines)


class PlainText(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
