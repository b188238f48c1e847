"""run.py from the outside: bad input, training, evaluation, interruption. Everything runs on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pairs import slow_but
from programs import Program
from real_rows import ROOT
from tiny_runs import (
    FREE,
    TRAINING,
    as_argv,
    refused,
    results_of,
)
from transformers import PLBartConfig, PLBartForConditionalGeneration

import run
from models import PromptLookup

BAD_FLAGS = {
    "nothing to do": ({"do_eval": False}, "--do_train"),
    "two methods": (FREE | {"static_exit_layer": 2}, "--static_exit_layer and --use_shallow_deep"),
    "layer too deep": ({"static_exit_layer": 6}, "--static_exit_layer must lie in 1..5"),
    "layer zero": ({"static_exit_layer": 0}, "--static_exit_layer must be positive"),
    "latency with a batch": ({"deploy_scenario": True}, "--per_device_eval_batch_size 1"),
    "threshold above one": (FREE | {"shallow2deep_conf_threshold": 1.5}, "--shallow2deep_conf_threshold"),
    "threshold below zero": ({"use_early_exit": True, "exit_conf_threshold": -0.1}, "--exit_conf_threshold"),
    "no confidence head": ({"use_early_exit": True, "exit_conf_type": "meta"}, "--train_meta_cm_head"),
    "confidence of another method": (FREE | {"exit_conf_threshold": 0.5}, "--use_early_exit True"),
    "output is a file": ({"output_dir": str(Path(__file__))}, "--output_dir"),
    "no room for a token": ({"val_max_target_length": 1}, "--val_max_target_length"),
    "no room in the Trainer's length": ({"generation_max_length": 1}, "--generation_max_length"),
    "negative length": ({"generation_max_length": -3}, "--generation_max_length"),
    "beams of training": ({"generation_num_beams": 4}, "--generation_num_beams"),
    "decay without a rate": (
        {"use_early_exit": True, "exit_decay_form": "paper"},
        "--exit_decay_form paper has no effect here: add --exit_position_temp",
    ),
    "a loss without training": (
        {"intermediate_loss_fn": "shallowdeep_ce"},
        "--intermediate_loss_fn has no effect here: add --do_train",
    ),
    "dropout without training": (
        {"layer_dropout": 0.1},
        "--layer_dropout has no effect here: add --do_train",
    ),
    "an exit that nothing reads": (
        {"exit_adapter_path": "save/exit"},
        "--exit_adapter_path has no effect at full depth: add --use_shallow_deep True",
    ),
    "an exit in training": (
        {"exit_adapter_path": "x", "do_train": True},
        "leave --do_train out, or the exit",
    ),
    "workers without training": (
        {"preprocessing_num_workers": 2},
        "--preprocessing_num_workers has no effect here: add --do_train",
    ),
    "a stream without training": ({"streaming": True}, "--streaming has no effect here: add --do_train"),
    "nothing is distilled": (
        {"intermediate_loss_fn": "shallowdeep_ce", "distill_layer_alpha": 0.3},
        "--distill_layer_alpha",
    ),
    "batch of none": ({"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size"),
    "wrong resume": ({"do_train": True, "resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint"),
    "idle flag": ({"use_adapt_threshold": True}, "--use_shallow_deep True"),
    "rollback without a pass": (
        FREE | {"rollback_conf_threshold": 1.0, "copy_skipped_hidden_states": True},
        "--rollback_conf_threshold",
    ),
    "no keys for skipped tokens": (FREE | {"parallel_gen_token": False}, "--copy_skipped_hidden_states"),
    "lookups with a batch": ({"lookup_tokens": 4}, "--lookup_tokens decodes one sequence at a time"),
    "lookups without a pass": (
        FREE | {"lookup_tokens": 4, "copy_skipped_hidden_states": True, "per_device_eval_batch_size": 1},
        "--lookup_tokens contradicts --copy_skipped_hidden_states",
    ),
    "lookups of another method": (
        {"static_exit_layer": 3, "lookup_tokens": 4},
        "--lookup_tokens is for FREE or full depth: leave out --static_exit_layer",
    ),
    "lookups where windows mix": (
        {"lookup_tokens": 4, "per_device_eval_batch_size": 1, "backend": "onnx", "precision": "w4"},
        "--lookup_tokens at full depth needs --precision fp32",
    ),
    "lookups of nothing": ({"lookup_tokens": 0}, "--lookup_tokens must be positive"),
    "lookups with beams": (
        {"lookup_tokens": 4, "num_beams": 2, "per_device_eval_batch_size": 1},
        "--lookup_tokens decodes greedily",
    ),
    "beams": (FREE | {"num_beams": 4}, "--num_beams"),
    "unknown flag": ({"shalow_exit_layer": 2}, "did you mean --shallow_exit_layer?"),
    "unknown choice": ({"intermediate_loss_fn": "kd"}, "intermediate_loss_fn"),
    "missing file": ({"validation_file": "nowhere.jsonl"}, "nowhere.jsonl"),
    "missing model": ({"model_name_or_path": "./nowhere"}, "./nowhere"),
    "wrong language": ({"source_lang": "fr"}, "found ['de', 'en']"),
    "distillation without a layer": (
        {"do_train": True, "intermediate_loss_fn": "shallowdeep_ce", "model_name_or_path": "PLAIN"},
        "--shallow_exit_layer",
    ),
    "FREE without a layer": (FREE | {"model_name_or_path": "PLAIN"}, "--shallow_exit_layer"),
    "truth that is neither": ({"paper_settings": "maybe"}, "--paper_settings"),
    "misspelt folder": ({"model_name_or_path": str(ROOT / "checkpoints/debian-t5-fre")}, "debian-t5-free"),
    "no baseline": ({"baseline_predictions": str(ROOT / "README.md")}, "README.md, line 1"),
    "one baseline for two splits": (
        {"do_predict": True, "baseline_predictions": str(ROOT / "README.md")},
        "--baseline_predictions is of one split",
    ),
    "no adaptive threshold": (
        FREE | {"use_adapt_threshold": True, "adapt_threshold_file": str(ROOT / "README.md")},
        "--adapt_threshold_file",
    ),
    "loss without a name": ({"output_hidden_states_decoder": True}, "--intermediate_loss_fn"),
}


@pytest.fixture(scope="module")
def plain_checkpoint(checkpoint, tmp_path_factory):
    """The same model, saved by someone who knows nothing of exits."""
    folder = tmp_path_factory.mktemp("plain")
    for file in checkpoint.iterdir():
        if file.name != "exit_config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_get_one_line(base, plain_checkpoint, capsys, name):
    changes, expected = BAD_FLAGS[name]
    flags = base | {"do_eval": True} | changes
    if flags["model_name_or_path"] == "PLAIN":
        flags["model_name_or_path"] = str(plain_checkpoint)
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(flags))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(errors) == 1 and expected in errors[0]


BAD_FILES = {
    "not JSON": ('{"translation": {"de": "a", "en": "b"}}\n{"translation": \n', "line 2"),
    "no such column": ('{"text": "a"}\n', "found text"),
    "empty": ("", "empty"),
    "not text": (b"\xff\xfe\x00\x01\x02\n", "bad.jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_one_line(base, tmp_path, capsys, name):
    content, expected = BAD_FILES[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(base | {"do_eval": True, "validation_file": path}))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(errors) == 1 and expected in errors[0] and "bad.jsonl" in errors[0]


@pytest.mark.slow
def test_bad_input_shows_no_traceback(base):
    program = Program("run.py", *as_argv(base | {"do_eval": True, "source_lang": "fr"}), cwd="/")
    printed = program.wait()
    assert program.code == 2
    assert "Traceback" not in printed and "error: " in printed


METHODS = {
    "full": {},
    "static": {"static_exit_layer": 3},
    "calm": {"use_early_exit": True, "exit_conf_threshold": 0.3, "exit_position_temp": 4.0},
    "free": FREE | {"shallow2deep_conf_threshold": 0.3},
    "free-adaptive": FREE | {"use_adapt_threshold": True},
    "free-copy": FREE | {"copy_skipped_hidden_states": True, "shallow2deep_conf_threshold": 0.3},
    "free-rollback": FREE | {"rollback_conf_threshold": 2.0, "shallow2deep_conf_threshold": 0.3},
}


DEPTHS = {"full": 6, "static": 3}


def layers_by_hand(name, exit_layers):
    """Layers that the tokens of one sequence went through, those made up for later included."""
    if not name.startswith("free") or name == "free-copy":
        return sum(exit_layers)
    if name == "free-adaptive":  # learns from every token, at the latest after the last
        return 6 * len(exit_layers)
    deep = [index for index, layer in enumerate(exit_layers) if layer == 6]
    return 2 * len(exit_layers) + 4 * (max(deep, default=-1) + 1)


@pytest.mark.parametrize("name", slow_but(["free", "full"], METHODS))
def test_evaluation_of_every_method(base, name):
    flags = base | METHODS[name]
    flags |= {"do_eval": True, "do_predict": True, "deploy_scenario": True, "per_device_eval_batch_size": 1}
    run.main(as_argv(flags))
    results = results_of(flags)
    predictions = Path(flags["output_dir"], "predictions.jsonl").read_text().splitlines()
    first = json.loads(predictions[0])
    assert results["samples"] == len(predictions) == 12
    assert results["tokens_per_second"] > 0 and {"bleu", "chrf", "bleu_unseen"} <= results.keys()
    assert first["id"] == "row-0" and len(first["exit_layers"]) == first["tokens"] == len(first["pieces"])
    depths = [json.loads(line)["exit_layers"] for line in predictions]
    by_hand = sum(layers_by_hand(name, row) for row in depths) / sum(map(len, depths))
    if name == "free-rollback":  # and what it took back
        assert results["average_layers"] >= by_hand
    else:
        assert results["average_layers"] == pytest.approx(by_hand)
    assert name not in ("full", "static") or {layer for row in depths for layer in row} == {DEPTHS[name]}
    assert results_of(flags, "predict")["samples"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "free", "lossless"])
def test_lookups_change_no_prediction(base, tmp_path, monkeypatch, name):
    method = METHODS | {"lossless": FREE | {"lossless": True, "shallow2deep_conf_threshold": 0.3}}
    asked, propose = [], PromptLookup.propose
    monkeypatch.setattr(PromptLookup, "propose", lambda *given: asked.append(given) or propose(*given))
    told = []
    for lookup in ({}, {"lookup_tokens": 4}):
        assert not asked
        folder = tmp_path / f"lookups{len(lookup)}"
        flags = base | method[name] | lookup
        flags |= {"do_eval": True, "per_device_eval_batch_size": 1, "output_dir": str(folder)}
        run.main(as_argv(flags))
        told.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
    plain, looking = told
    assert [row["prediction"] for row in plain] == [row["prediction"] for row in looking]
    assert len(asked) >= len(looking) == 12


@pytest.mark.slow
def test_adaptive_threshold_is_carried_over(base, capsys):
    flags = base | FREE | {"do_eval": True, "use_adapt_threshold": True, "adapt_zeta": 0.9}
    run.main(as_argv(flags))
    saved = Path(flags["output_dir"], "adaptive_threshold.json")
    before = json.loads(saved.read_text())["observed"]
    run.main(as_argv(flags | {"adapt_threshold_file": str(saved)}))
    after = json.loads(saved.read_text())["observed"]
    assert after["num_sequences"] == 2 * before["num_sequences"]
    assert after["confidences"][: len(before["confidences"])] == before["confidences"]
    for name in ("adapt_zeta", "shallow2deep_conf_threshold"):
        line = refused(flags | {name: 0.5, "adapt_threshold_file": str(saved)}, capsys)
        assert f"--{name} 0.5 contradicts --adapt_threshold_file" in line and "begun with 0.9" in line


def test_each_stage_leaves_its_own_threshold(base):
    flags = base | FREE | {"use_adapt_threshold": True, "max_eval_samples": 2, "max_predict_samples": 3}
    run.main(as_argv(flags | {"do_eval": True, "do_predict": True, "per_device_eval_batch_size": 1}))
    names = {"adaptive_threshold.json": 2, "adaptive_threshold_test.json": 3}
    for name, sequences in names.items():
        content = json.loads(Path(flags["output_dir"], name).read_text())
        assert content["observed"]["num_sequences"] == sequences


def test_exit_layer_of_the_checkpoint_is_the_default(base):
    flags = base | FREE | {"do_eval": True, "shallow2deep_conf_threshold": 0.0}
    run.main(as_argv(flags))
    first = json.loads(Path(flags["output_dir"], "predictions.jsonl").read_text().splitlines()[0])
    assert set(first["exit_layers"]) == {2}


@pytest.mark.slow
def test_batches_and_argument_files_give_the_same_text(base, tmp_path):
    texts = []
    for size in (1, 5):
        flags = base | FREE | {"do_eval": True, "per_device_eval_batch_size": size}
        flags |= {"shallow2deep_conf_threshold": 0.3, "output_dir": str(tmp_path / f"batch{size}")}
        file = tmp_path / f"arguments{size}.yaml"
        file.write_text("\n".join(f"{name}: {value}" for name, value in flags.items()))
        run.main([str(file)])
        lines = Path(flags["output_dir"], "predictions.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["prediction"] for line in lines])
    assert texts[0] == texts[1]


LOSSES = {
    "ce": {"intermediate_loss_fn": "weighted_ce"},
    "distillation": {"intermediate_loss_fn": "shallowdeep_kd_dyna", "do_layer_transformation": True},
    "head": {"train_meta_cm_head": True},
    "plain": {},
    "muon": {"intermediate_loss_fn": "shallowdeep_ce", "use_muon": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_train_save_reload_evaluate(base, name):
    train = base | TRAINING | LOSSES[name] | {"shallow_exit_layer": 2}
    evaluation = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 3, "predict_with_generate": True}
    run.main(as_argv(train | evaluation))
    trained = results_of(train)
    history = json.loads(Path(train["output_dir"], "trainer_state.json").read_text())["log_history"]
    assert any("eval_bleu" in entry for entry in history)
    parts = {"ce": "ce_layer_1", "distillation": "distillation", "head": "cm_layer_2", "muon": "ce_layer_6"}
    assert name not in parts or sum(parts[name] in entry for entry in history) == 6
    again = base | {"model_name_or_path": train["output_dir"], "do_eval": True}
    again["output_dir"] += "-again"
    run.main(as_argv(again))
    assert results_of(again)["tokens"] == trained["tokens"]
    texts = [Path(flags["output_dir"], "predictions.jsonl").read_text() for flags in (train, again)]
    assert predictions_in(texts[0]) == predictions_in(texts[1])
    if name == "head":
        meta = again | FREE | {"shallow2deep_conf_type": "meta", "shallow2deep_conf_threshold": 0.5}
        run.main(as_argv(meta))


def predictions_in(text):
    return [json.loads(line)["prediction"] for line in text.splitlines()]


def test_unsupported_families_get_one_line(base, tmp_path, capsys):
    config = PLBartConfig(vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=8)
    config.decoder_ffn_dim, config.encoder_attention_heads, config.decoder_attention_heads = 8, 2, 2
    shutil.copytree(base["model_name_or_path"], tmp_path / "plbart")
    PLBartForConditionalGeneration(config).save_pretrained(tmp_path / "plbart")
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(base | {"do_eval": True, "model_name_or_path": str(tmp_path / "plbart")}))
    assert stop.value.code == 2 and "view" in capsys.readouterr().err


def test_corrupt_weights_get_one_line(base, tmp_path, capsys):
    folder = tmp_path / "corrupt"
    shutil.copytree(base["model_name_or_path"], folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        run.main(as_argv(base | {"do_eval": True, "model_name_or_path": str(folder)}))
    assert stop.value.code == 2 and str(folder) in capsys.readouterr().err


def test_help_shows_all_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    shown = capsys.readouterr().out
    flags = ("--model_name_or_path", "--use_shallow_deep", "--intermediate_loss_fn", "--paper_settings")
    assert stop.value.code == 0 and all(flag in shown for flag in flags)


def test_missing_evaluation_rows_are_found_before_training(base, capsys):
    flags = base | TRAINING | {"do_eval": "True"}
    del flags["validation_file"]
    with pytest.raises(SystemExit):
        run.main(as_argv(flags))
    assert "--validation_file" in capsys.readouterr().err
    assert not Path(flags["output_dir"], "model.safetensors").exists()
