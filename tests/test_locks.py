"""Every command that writes into a folder, or a file, refuses one that another run is writing."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from real_rows import ROOT

from util.files import locked

CHECKPOINT = str(ROOT / "checkpoints/debian-t5-free")
MODEL = ["--model_name_or_path", CHECKPOINT]
DATA = ["--dataset_name", "debian_de_en"]
FOLDER_SCRIPTS = {
    "run": [*MODEL, *DATA, "--do_eval", "True"],
    "sweep": ["--free", CHECKPOINT, *DATA],
    "calibrate": [*MODEL, *DATA, "--use_shallow_deep", "True"],
    "choose_exit": [*MODEL, *DATA],
    "report": ["nowhere"],
    "simulate_calibration": ["--losses_file", str(ROOT / "README.md")],
    "train_tokenizer": DATA,
    "export_checkpoint": ["--run", "nowhere", "--title", "a", "--train_script", "b"],
    "export_custom_generate": [],
    "build_debian_data": [],
    "export_static": MODEL,
}
FILE_SCRIPTS = {
    "distill_targets": [*MODEL, *DATA],
    "learn_shortlist": [*MODEL, *DATA],
    "make_exit_prompts": [],
}


def main_of(name):
    path = ROOT / ("run.py" if name == "run" else f"scripts/{name}.py")
    spec = importlib.util.spec_from_file_location(f"command_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def refusal(name, argv, monkeypatch, capsys):
    """The one line of a command's answer; its flags are parsed as from the shell."""
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(SystemExit) as stop:
        main_of(name)()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("name", FOLDER_SCRIPTS)
def test_a_folder_that_another_run_writes_into_is_refused(tmp_path, monkeypatch, capsys, name):
    argv = [*FOLDER_SCRIPTS[name], "--output_dir", str(tmp_path)]
    # A report makes no folder before it has read what goes into it.
    monkeypatch.setattr("util.report.folders.read_folders", lambda folders: None)
    with locked(tmp_path / ".lock", ""):
        line = refusal(name, argv, monkeypatch, capsys)
    assert f"--output_dir {tmp_path}: another run is writing there" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILE_SCRIPTS)
def test_a_file_that_another_run_writes_is_refused(tmp_path, monkeypatch, capsys, name):
    path = tmp_path / "out.jsonl.gz"
    with locked(tmp_path / ".out.jsonl.gz.lock", ""):
        line = refusal(name, [*FILE_SCRIPTS[name], "--output_file", str(path)], monkeypatch, capsys)
    assert f"--output_file {path}: another run is writing it" in line
