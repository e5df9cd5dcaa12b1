"""The notebook runs from its first cell to its last, and is committed with its outputs."""

import nbformat
from conftest import ROOT
from nbclient import NotebookClient


PATH = ROOT / "notebooks" / "tokentrim.ipynb"


def test_the_notebook_runs():
    notebook = nbformat.read(PATH, as_version=4)
    committed = [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    ran = [
        [output.output_type for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for cell in notebook.cells
    ]
    assert ran == committed
    assert PATH.stat().st_size < 1_500_000
