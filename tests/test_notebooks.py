"""The notebooks run from their first cell to their last, and say what they are shown to say."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from real_rows import ROOT
from transformers.utils import logging

BY_JUPYTER = "tour"  # the others' cells and programs run here, where the libraries are loaded
SAVED = {path.stem: path for path in sorted(ROOT.glob("docs/notebooks/*.ipynb"))}
LARGEST = 20_000  # bytes, outputs among them


def cells_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """By cell, what Python itself printed: programs that cells start tell times."""
    return [
        "".join(
            output.get("text", "") for output in cell.get("outputs", []) if output.get("name") == "stdout"
        )
        for cell in cells_of(notebook)
        if not cell.source.startswith("!")
    ]


def printed_by_jupyter(notebook, folder):
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return printed(notebook)


def run_program(cell):
    """`main` of the script that a cell starts; what the shell does with its output is left out."""
    (command,) = re.fullmatch(r"!(.*?)(?: \| [^|]*| > \S+)?", cell.replace("\\\n", " "), re.DOTALL).groups()
    python, script, *flags = shlex.split(command)
    assert python == "{sys.executable}"
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(flags)


def printed_here(notebook, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shows_progress, outputs, scope = logging.is_progress_bar_enabled(), [], {}
    for cell in cells_of(notebook):
        capsys.readouterr()
        if cell.source.startswith("!"):
            run_program(cell.source)
        else:
            exec(cell.source, scope)
            outputs.append(capsys.readouterr().out)
    if shows_progress:
        logging.enable_progress_bar()
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_notebook_prints_what_it_is_saved_with(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the kernel and what it starts
    for part in ("models", "util", "scripts", "checkpoints", "data", "run.py"):
        Path(tmp_path, part).symlink_to(ROOT / part)
    folder = tmp_path / "docs/notebooks"
    folder.mkdir(parents=True)
    shutil.copy(SAVED[name], folder)
    saved = nbformat.read(SAVED[name], as_version=4)
    running = nbformat.read(SAVED[name], as_version=4)
    if name == BY_JUPYTER:
        outputs = printed_by_jupyter(running, folder)
    else:
        outputs = printed_here(running, folder, monkeypatch, capsys)
    assert outputs == printed(saved)


@pytest.mark.parametrize("name", SAVED)
def test_saved_notebooks_are_small(name):
    assert SAVED[name].stat().st_size < LARGEST
