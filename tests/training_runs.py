"""Short trainings of a tiny model on real rows, as run.py does them."""

from __future__ import annotations

import torch
from real_rows import ROOT
from tiny_models import tiny_model
from transformers import AutoTokenizer

import run
from models.loading import load_model

DATA = {
    "task": "translation",
    "dataset_name": "debian_de_en",
    "max_source_length": 24,
    "max_target_length": 12,
}
QUIET = {"report_to": "none", "disable_tqdm": True, "backend": "torch"}
FREE = {"intermediate_loss_fn": "shallowdeep_kd_dyna", "shallow_exit_layer": 2}
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "max_eval_samples": 3,
    "predict_with_generate": True,
    "load_best_model_at_end": True,
}


def as_argv(**flags):
    """Command line of the flags that are not None."""
    given = {name: value for name, value in flags.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def train_flags(base, output_dir, **flags):
    settings = {
        "model_name_or_path": base,
        "do_train": True,
        "output_dir": output_dir,
        "max_train_samples": 24,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 3,
    }
    return DATA | QUIET | settings | FREE | flags


def train(base, output_dir, **flags):
    run.main(as_argv(**train_flags(base, output_dir, **flags)))
    return load_model(str(output_dir)).model.state_dict()


def assert_same(first, second):
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, msg=name)


def save_base(folder):
    """A tiny random model with a real vocabulary: its folder."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    tiny_model(num_layers=4, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
