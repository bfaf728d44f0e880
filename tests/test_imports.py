"""Imports point one way: each folder may import itself and those before it, also inside functions."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fedlq_ray"
# What stands before imports everything else, or is imported before everything else.
GROUND = ("errors", "files", "seeding", "shadows", "startup", "__init__")
ORDER = (
    "config", "problems", "models", "quantization", "data", "training", "significance", "strategies", "federation",
    "plots", "tracking", "hosts", "runs", "sweeps", "analysis", "api", "cli",
)  # fmt: skip


def imports(file: Path) -> set[str]:
    """The parts of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "fedlq_ray":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlq_ray."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {name.name.split(".")[1] for name in node.names if name.name.startswith("fedlq_ray.")}
    return found


def test_imports_point_one_way():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        allowed = {*GROUND, *(() if part in GROUND else ORDER[: ORDER.index(part) + 1])}
        wrong += [f"{file.relative_to(PACKAGE)} imports {name}" for name in imports(file) - allowed if name in ORDER]
    assert not wrong


def test_the_top_of_the_package_has_few_modules_and_no_file_is_long():
    assert len([file for file in PACKAGE.glob("*.py") if file.stem != "__init__"]) <= 10
    assert {part.stem for part in PACKAGE.iterdir() if part.suffix in ("", ".py")} <= {*GROUND, *ORDER, "__pycache__"}
    assert [file for file in PACKAGE.rglob("*.py") if len(file.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_no_function_is_longer_than_60_lines():
    long = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > 60:
                long.append(f"{file.relative_to(PACKAGE)}: {node.name}")
    assert not long
