"""Files are UTF-8 whatever the locale: every call that opens text names its encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = {"open", "fdopen", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile"}
OTHERS = {"os", "tarfile", "Image", "tempfile"}  # whose `open` is none of text


def unnamed(source):
    """The lines of calls that take the locale's encoding."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = {word.arg for word in call.keywords}
        values = [ast.unparse(value) for value in (*call.args, *(word.value for word in call.keywords))]
        binary = any(value.strip("'\"") in ("rb", "wb", "ab", "r+b", "x+b") for value in values)
        foreign = getattr(getattr(call.func, "value", None), "id", "") in OTHERS
        if name in TEXT and not foreign and not binary and "encoding" not in given:
            yield call.lineno
        if name in ("run", "Popen", "check_output") and "text" in given and "encoding" not in given:
            yield call.lineno


def test_what_counts():
    source = "open('a')\nopen('a', 'rb')\np.read_text()\np.open('w', encoding='utf-8')\nsubprocess.run(c, text=True)\n"
    assert list(unnamed(source)) == [1, 3, 5]


@pytest.mark.parametrize("folder", ["fedlq_ray", "experiments", "docs"])
def test_every_file_is_opened_as_utf8(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    found = [f"{file}:{line}" for file in files for line in unnamed(file.read_text(encoding="utf-8"))]
    assert not found, found
