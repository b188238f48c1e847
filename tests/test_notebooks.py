"""The notebooks run from their first cell to their last, and say what they are shown to say."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from real_rows import ROOT

SAVED = {path.stem: path for path in sorted(ROOT.glob("docs/notebooks/*.ipynb"))}
LARGEST = 20_000  # bytes, outputs among them


def printed(notebook):
    """By cell, what Python itself printed: programs that cells start tell times."""
    return [
        "".join(
            output.get("text", "") for output in cell.get("outputs", []) if output.get("name") == "stdout"
        )
        for cell in notebook.cells
        if cell.cell_type == "code" and not cell.source.startswith("!")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_notebook_prints_what_it_is_saved_with(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the kernel and what it starts
    for part in ("models", "util", "scripts", "checkpoints", "data", "run.py"):
        Path(tmp_path, part).symlink_to(ROOT / part)
    folder = tmp_path / "docs/notebooks"
    folder.mkdir(parents=True)
    shutil.copy(SAVED[name], folder)
    saved = nbformat.read(SAVED[name], as_version=4)
    running = nbformat.read(SAVED[name], as_version=4)
    NotebookClient(running, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert printed(running) == printed(saved)


@pytest.mark.parametrize("name", SAVED)
def test_saved_notebooks_are_small(name):
    assert SAVED[name].stat().st_size < LARGEST
