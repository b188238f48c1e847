"""Trained by run.py's own steps, saved, and loaded in a new process: every method decodes the same there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from every_method import decode_with_every_method
from programs import run_program
from tiny_causal import tiny_causal
from transformers import AutoTokenizer

import run
from models import load_model
from util.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
DEEP = {"shallow_exit_layer": 2}
TRAININGS = {  # one of each kind of view, and of each kind of thing that a checkpoint remembers
    "llama-tied": {
        "intermediate_loss_fn": "sum_l", "e_scale": 0.5, "exit_curriculum": "rotational",
        "rotation_interval": 2, "layer_dropout": 0.2, "per_exit_head": "norm",
    },
    "gpt2-tied": DEEP | {"intermediate_loss_fn": "shallowdeep_kd_dyna", "do_layer_transformation": True},
    "pythia": DEEP | {"train_meta_cm_head": True},
    "opt-350m": {"intermediate_loss_fn": "weighted_ce", "per_exit_head": "projection"},
}  # fmt: skip
SETTINGS = {
    "task": "translation", "dataset_name": "debian_de_en", "max_source_length": 24, "max_target_length": 12,
    "do_train": True, "max_steps": 30, "max_train_samples": 8, "per_device_train_batch_size": 4,
    "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


def train(base, folder, **flags):
    """As run.py trains; the model as it is in memory then."""
    given = SETTINGS | {"model_name_or_path": base, "output_dir": folder} | flags
    arguments = parse_arguments([word for name, value in given.items() for word in (f"--{name}", str(value))])
    loaded, exit_flags = run.open_model(arguments)
    run.train(arguments, exit_flags, loaded)
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By family: the folder of a trained model, what each method decodes before training, and after it."""
    tokenizer, results = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free"), {}
    for family, flags in TRAININGS.items():
        base, folder = tmp_path_factory.mktemp(family), tmp_path_factory.mktemp(f"{family}-trained")
        tiny_causal(family, num_layers=4, vocab_size=len(tokenizer)).save_pretrained(base)
        tokenizer.save_pretrained(base)
        before = decode_with_every_method(load_model(str(base)))
        here = decode_with_every_method(train(base, folder, **flags))
        results[family] = str(folder), *json.loads(json.dumps([before, here]))
    return results


@pytest.fixture(scope="module")
def again(trained):
    """By family: what each method decodes in a new process."""
    printed = run_program("tests/every_method.py", *(folder for folder, _, _ in trained.values()))
    return dict(zip(trained, json.loads(printed.splitlines()[-1]).values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAININGS)
def test_a_new_process_decodes_what_the_training_one_does(trained, again, family):
    _, _, here = trained[family]
    for method, found in here.items():
        assert again[family][method] == found, method  # ids, exit layers and confidences


@pytest.mark.parametrize("family", TRAININGS)
def test_what_is_compared_depends_on_training_and_method(trained, family):
    _, before, here = trained[family]
    assert here["lossless"][0] == here["full"][0]
    assert here["static"][0] != here["full"][0]
    for method in ("calm", "free"):
        layers = {layer for row in here[method][1] for layer in row}
        assert min(layers) < 4, method
    changed = "free" if "train_meta_cm_head" in TRAININGS[family] else "full"  # whose weights stay
    assert here[changed] != before[changed]
