"""Rows, flags and outcomes of runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model
from transformers import T5Tokenizer

import run
from models.exit_heads import ExitConfig

GERMAN = ["ein", "das", "paket", "enthält", "die", "bibliothek", "für", "programm", "daten"]
ENGLISH = ["the", "package", "library", "for", "program", "data"]
FREE = {"use_shallow_deep": True}
TRAINING = {
    "do_train": True,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
}


def as_argv(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def results_of(flags, stage="eval"):
    return json.loads(Path(flags["output_dir"], f"{stage}_results.json").read_text())


def losses_of(folder):
    history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def refused(flags, capsys):
    """The one line that run.py answers with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(flags))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


def save_checkpoint(folder):
    """A tiny model with a word-level vocabulary, trained (so it says) to exit after layer 2: its folder."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -3.0) for word in GERMAN + ENGLISH]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    ExitConfig("shallowdeep_ce", 2).save(folder)
    return folder


def write_rows(path):
    """Twelve rows in a .jsonl file: its path."""
    lines = []
    for index in range(12):
        german, english = GERMAN[index % 5 :][:5], ENGLISH[index % 4 :][:3]
        row = {"id": f"row-{index}", "translation": {"de": " ".join(german), "en": " ".join(english)}}
        lines.append(json.dumps(row | {"seen_in_train": index % 4 == 0}))
    path.write_text("\n".join(lines) + "\n")
    return path


def base_flags(checkpoint, rows, output_dir):
    return {
        "model_name_or_path": str(checkpoint),
        "task": "translation",
        "train_file": str(rows),
        "validation_file": str(rows),
        "test_file": str(rows),
        "source_lang": "de",
        "target_lang": "en",
        "output_dir": str(output_dir),
        "max_target_length": "10",
        "use_cpu": "True",
        "backend": "torch",
        "report_to": "none",
        "disable_tqdm": "True",
    }
