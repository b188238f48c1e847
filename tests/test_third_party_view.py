"""A view from outside that is `DecoderView` and nothing else: trained, evaluated, decoded by every policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from third_party import (
    FAMILY,
    OnlyTheProtocol,
    PebbleConfig,
    PebbleForConditionalGeneration,
    register_with_transformers,
)
from tiny_models import padded_inputs
from transformers import AutoTokenizer

import run
from models import (
    Calm,
    FixedThreshold,
    Free,
    FullDepth,
    ShortlistGap,
    SoftmaxGap,
    StaticExit,
    early_exit_decode,
    load_model,
    register_view,
    view_for,
)
from models.families import VIEWS

TOKENIZER = "checkpoints/debian-t5-free"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr("models.families.VIEWS", dict(VIEWS))
    register_with_transformers()
    register_view(FAMILY, OnlyTheProtocol)


def tiny_pebble(**settings):
    torch.manual_seed(0)
    return PebbleForConditionalGeneration(PebbleConfig(**settings)).eval()


def decode(model, inputs, policy):
    options = {"custom_generate": early_exit_decode, "exit_policy": policy}
    return model.generate(**inputs, max_length=16, do_sample=False, **options)


@torch.no_grad()
def decode_slowly(model, inputs, layers, max_length=16):
    """Greedy tokens of the first `layers` layers, the whole prefix anew for each."""
    tokens = torch.zeros(1, 1, dtype=torch.long)
    while tokens.shape[1] < max_length and tokens[0, -1] != model.config.eos_token_id:
        states = model(**inputs, decoder_input_ids=tokens, output_hidden_states=True).decoder_hidden_states
        last = states[-1] if layers == len(states) - 1 else model.polish(states[layers])
        tokens = torch.cat([tokens, model.out(last[:, -1:]).argmax(-1)], 1)
    return tokens


def test_every_policy_needs_the_protocol_alone():
    model, inputs = tiny_pebble().double(), padded_inputs()
    full, shallow = (decode_slowly(model, inputs, layers) for layers in (4, 2))
    assert not torch.equal(full, shallow)
    gap, shortlist = SoftmaxGap(), ShortlistGap(view_for(model), torch.arange(40))
    never, always, some = FixedThreshold(2.0), FixedThreshold(-1.0), FixedThreshold(0.2)
    for policy, expected in (
        (FullDepth(), full),
        (StaticExit(2), shallow),
        (Calm(shortlist, never), full),
        (Free(2, gap, never), full),
        (Free(2, gap, always), shallow),
        (Calm(gap, always, min_layer=2), None),
        (Free(2, gap, some, copy_skipped=True), None),
        (Free(2, gap, some, rollback_threshold=1.0), None),
        (Free(2, gap, some, lossless=True), full),
    ):
        output = decode(model, inputs, policy)
        assert expected is None or torch.equal(output, expected)


def run_main(**flags):
    run.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])


def test_run_py_trains_and_evaluates_it(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tiny_pebble(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shared = {"task": "translation", "dataset_name": "debian_de_en", "max_source_length": 24}
    shared |= {"max_target_length": 12, "val_max_target_length": 12, "use_cpu": True, "report_to": "none"}
    trained = tmp_path / "trained"
    training = {"max_steps": 4, "max_train_samples": 16, "per_device_train_batch_size": 4, "do_train": True}
    training |= {"intermediate_loss_fn": "shallowdeep_kd_dyna", "do_layer_transformation": True}
    training |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "shallow_exit_layer": 2}
    run_main(**shared, **training, model_name_or_path=tmp_path / "base", output_dir=trained)
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert {"ce_layer_2", "ce_layer_4", "distillation"} <= set(history[0])

    loaded = load_model(str(trained))
    evaluation = shared | {"do_eval": True, "max_eval_samples": 3, "model_name_or_path": trained}
    methods = {"lossless": {"use_shallow_deep": True, "lossless": True}, "static": {"static_exit_layer": 2}}
    for name, flags in methods.items():
        run_main(**evaluation, **flags, output_dir=tmp_path / name)
        for line in Path(tmp_path, name, "predictions.jsonl").read_text().splitlines():
            record = json.loads(line)
            inputs = tokenizer(record["source"], max_length=24, truncation=True, return_tensors="pt")
            tokens = decode_slowly(loaded.model, inputs, 2 if name == "static" else 4, max_length=12)
            assert record["prediction"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
