"""The prose of the package and of the docs uses plain words: no phrase that the project's style retires."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Retired phrases, and what to write instead. Patterns are word-bounded and ignore case; a space is any white space.
_ONE = r"row|line|figure|file|norm|point|panel|picture|segment|cell|sentence|actor"
_PER = r"client|run|round|layer|level|seed|bucket|segment|group|core|node|actor|population|method|device"
_PEOPLE = r"(?<!users\s)(?<!readers\s)(?<!people\s)(?<!authors\s)"
RETIRED = {
    r"(?:is|are|was|were|be) told(?! apart)": "is reported, gets",
    r"tells": "reports, states, shows",
    r"go(?:es|ing)? on(?! (?:top|the|a|which|to (?:a|the)))|went on": "continue, resume",
    r"(?:bits|bytes|figures|steps|samples) an? (?:parameter|element|weight|second|round|client)(?=\s*(?:[.,;:)]|$))":
        "... per ..., such as bits per parameter",
    rf"(?:an?|one) (?:{_ONE}) an? (?:{_PER})": "one ... per ..., such as one row per client",
    r"once an? (?:round|model|client|layer)": "once per ...",
    r"whoever|whatever it (?:is|was)": "the client that, any",
    r"(?:clients?|members?|actors?|nodes?|workers?|runs?|layers?|process(?:es)?) who": "... that",
    rf"{_PEOPLE}who (?:is|are|has|had|trains|sends|comes|waits|only|merely)(?! (?:it|this) for)": "the client that",
    r"beside": "next to, in addition to, with",
    r"ma(?:kes?|de) good": "repairs",
    r"given up": "abandoned, replaced",
    r"comes? in(?=\s*(?:[.,;:)]|$))|goes out|went out": "arrives, is sent",
    r"(?:what|which|that|each|who) (?:is|are) to (?!(?:be )?(?:the|a|an|all|its)\b)\w+": "will, should, must",
    r"ha(?:s|ve) to do(?! with\b)": "must do",
    r"as [\w' -]{1,40} ha(?:s|ve) (?:it|them)(?=\s*(?:[.,;:)]|$))": "as in ...",
    r"(?:what|that which) is so": "such values",
    r"(?:is|are|was|were) due(?! to\b)": "is expected",
    r"where (?:it|that|this) is so": "if so",
    r"anew": "again, from the start",
    r"foretells?|henceforth|whence|thereof|therein|thereby|hitherto|aught|nought": "a modern word",
    r"is (?:no|none) of ours": "is not one of ours",
}  # fmt: skip
PATTERN = {
    re.compile(r"(?<!\w)(?:" + phrase.replace(" ", r"\s+") + r")(?!\w)", re.IGNORECASE): instead
    for phrase, instead in RETIRED.items()
}
Piece = tuple[int, str]  # its first line, and its text


def prose(file: Path) -> Iterator[Piece]:
    """Pieces of prose: a Python file's strings and comments, or a Markdown file without its code."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from ((node.lineno, node.value) for node in ast.walk(ast.parse(text)) if _is_text(node))
        yield from _comments(text)
    else:
        # Code goes, its lines stay.
        plain = re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        yield 1, re.sub(r"`[^`\n]*`|\]\([^)\n]*\)", "``", plain)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _comments(text: str) -> Iterator[Piece]:
    """Comments; adjacent lines are one piece."""
    found: list[Piece] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        first, so_far = found[-1] if found else (-1, "")
        comment = token.string.lstrip("# ")
        if found and token.start[0] == first + so_far.count("\n") + 1:
            found[-1] = (first, f"{so_far}\n{comment}")
        else:
            found.append((token.start[0], comment))
    yield from found


def retired(pieces: Iterator[Piece]) -> list[tuple[int, str, str]]:
    """Line, phrase and suggestion of each retired phrase."""
    found = []
    for first, text in pieces:
        for pattern, instead in PATTERN.items():
            for match in pattern.finditer(text):
                line = first + text[: match.start()].count("\n")
                found.append((line, " ".join(match[0].split()), instead))
    return sorted(found)


def files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "fedlq_ray/*.py", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_no_prose_uses_a_retired_phrase() -> None:
    hits = [
        f"{file.relative_to(ROOT)}:{line}: {phrase} -> {instead}"
        for file in files()
        for line, phrase, instead in retired(prose(file))
    ]
    assert not hits, "\n".join(["write instead:", *hits])


def test_phrases_are_found_across_lines_and_by_line(tmp_path: Path) -> None:
    code = tmp_path / "m.py"
    code.write_text('"""A run\n\ngoes\non."""\nx = f"{x} is told"  # beside\n# one\n# a row a client\nbeside = 1\n')
    assert retired(prose(code)) == [
        (3, "goes on", "continue, resume"),
        (5, "beside", "next to, in addition to, with"),
        (5, "is told", "is reported, gets"),
        (7, "a row a client", "one ... per ..., such as one row per client"),
    ]
    page = tmp_path / "m.md"
    page.write_text("```\ngoes on\n```\nIt has `told` beside `goes on`.\n")
    assert retired(prose(page)) == [(4, "beside", "next to, in addition to, with")]


@pytest.mark.parametrize(
    "text",
    [
        "It goes on the disk, and is due to a lock; readers who are in a hurry; two runs cannot be told apart.",
        "4 bits per parameter; the samples a client holds; besides, a file a user gives, which has to do with it.",
        "The aim is to be fair; 3 is to 4 what 6 is to 8.",
    ],
)
def test_ordinary_phrases_pass(text: str) -> None:
    assert not retired(iter([(1, text)]))
