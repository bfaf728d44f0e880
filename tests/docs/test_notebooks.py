"""The notebooks run from their first cell to their last, at a small size, and are saved as they were run last."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra docs")
nbclient = pytest.importorskip("nbclient", reason="needs the extra docs")

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
SMALL = {
    "layer_analysis": 'data, rounds = "digits", 3',
    "comparing_strategies": "rounds, seeds, target = 3, [0, 1], 0.2",
}


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    at = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(at) == 1
    notebook.cells.insert(at[0] + 1, nbformat.v4.new_code_cell(SMALL[name]))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_saved_with_what_it_gave(name):
    cells = [cell for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [cell for cell in cells if any("image/png" in o.get("data", {}) for o in cell.outputs)]
    assert pictures and all(cell.metadata["alt"] for cell in pictures)


def test_all_notebooks_are_run():
    assert {file.stem for file in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)
