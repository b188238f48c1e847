"""Trainings in pieces: several processes, micro-batches, recomputed states."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from programs import run_in_two_processes, run_program
from real_rows import ROOT
from tiny_models import padded_inputs, tiny_model
from training_runs import DATA, QUIET, as_argv, assert_same, save_base, train, train_flags

import run
from models.errors import UserError
from models.families import view_for
from models.loading import load_model
from models.losses import INTERMEDIATE_LOSSES, build_exit_loss
from util.arguments import parse_arguments


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def logged_losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "distillation", "ce_layer_2", "ce_layer_4")
    return [pytest.approx([row[name] for name in names], rel=1e-4) for row in history if "loss" in row]


@pytest.mark.slow
def test_two_processes_equal_one(base, tmp_path):
    """The plain command: the same batches in four pieces, a sharded evaluation, with FREE in batches."""
    steps = {"optim": "sgd", "learning_rate": 1e-2, "logging_steps": 3}
    pieces = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    one = DATA | QUIET | {"do_eval": True, "max_eval_samples": 7, "per_device_eval_batch_size": 2}
    one |= {"use_shallow_deep": True, "shallow_exit_layer": 2, "shallow2deep_conf_threshold": 0.02}
    run_in_two_processes("run.py", *as_argv(**train_flags(base, tmp_path / "two", **steps, **pieces) | one))
    weights = train(base, tmp_path / "one", **steps, per_device_train_batch_size=4)
    assert_same(weights, load_model(str(tmp_path / "two")).model.state_dict())
    assert [row.expected for row in logged_losses(tmp_path / "one")] == logged_losses(tmp_path / "two")
    checked = one | {"model_name_or_path": tmp_path / "two", "output_dir": tmp_path / "check"}
    run.main(as_argv(**checked))
    for name in ("predictions.jsonl", "predictions.scores.jsonl"):
        lines = [(tmp_path / folder / name).read_text().splitlines() for folder in ("two", "check")]
        kept = [[drop_times(json.loads(line)) for line in part] for part in lines]
        assert kept[0] == kept[1] and len(kept[0]) == 7
    both = [json.loads((tmp_path / folder / "eval_results.json").read_text()) for folder in ("two", "check")]
    for name in ("bleu", "chrf", "average_layers", "exit_share", "tokens", "confidence_intervals"):
        assert both[0][name] == both[1][name]


@pytest.mark.slow
def test_sharded_weights_have_the_same_loss_and_gradients():
    """FSDP of both versions on two CPU processes."""
    run_program("tests/sharded_step.py")


def test_configuration_for_sharded_training_wraps_every_block(monkeypatch):
    """As accelerate reads it: version 1, as version 2 refuses shared embeddings, and whole T5 blocks."""
    path = str(ROOT / "scripts/accelerate/fsdp.yaml")
    flags = launch_command_parser().parse_args(["--config_file", path, "run.py", "--do_train"])
    flags = _validate_launch_command(flags)[0]
    assert flags.use_fsdp
    for name, value in prepare_multi_gpu_env(flags).items():
        monkeypatch.setenv(name, value)
    plugin, model = FullyShardedDataParallelPlugin(), tiny_model()
    plugin.set_auto_wrap_policy(model)
    asked = {"recurse": False, "nonwrapped_numel": 0}
    wrapped = [module for module in model.modules() if plugin.auto_wrap_policy(module, **asked)]
    assert plugin.fsdp_version == 1 and wrapped == [*model.encoder.block, *model.decoder.block]


def drop_times(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "calibration")}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"intermediate_loss_fn": None, "label_smoothing_factor": 0.1}])
def test_accumulated_steps_equal_those_of_a_larger_batch(base, tmp_path, flags):
    """Micro-batches are of different lengths, and the last ones of an epoch fewer."""
    flags = flags | {"optim": "sgd", "num_train_epochs": 1, "max_steps": -1, "save_strategy": "no"}
    flags |= {"max_train_samples": 11, "learning_rate": 1e-2}
    pieces = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    small = train(base, tmp_path / "small", **flags, **pieces)
    assert_same(train(base, tmp_path / "large", **flags, per_device_train_batch_size=4), small)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *(("t5-tied", name) for name in INTERMEDIATE_LOSSES),
        *((shape, "shallowdeep_kd_dyna") for shape in ("umt5", "longt5-tglobal", "bart-tied", "pegasus")),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(shape, name):
    gradients = []
    labels = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    for checkpointing in (False, True):
        model = tiny_model(shape, num_layers=4).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        view = view_for(model)
        inputs = padded_inputs(2) | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}
        outputs = model(**inputs, output_hidden_states=True, use_cache=False)
        build_exit_loss(view, name, 2)(view, outputs, labels).total.backward()
        gradients.append({key: weight.grad for key, weight in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_processes_that_do_not_work_together_are_refused(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("util.arguments.launched_processes", lambda: 2)
    with pytest.raises(SystemExit):
        train(base, tmp_path)
    assert "2 processes were started" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["use_adapt_threshold", "auto_exit"])
@pytest.mark.parametrize("stage", ["do_eval", "do_predict", "predict_with_generate"])
def test_what_learns_from_sample_to_sample_is_refused_in_shares(base, tmp_path, monkeypatch, method, stage):
    flags = DATA | QUIET | {"use_cpu": True, "per_device_eval_batch_size": 1, "output_dir": tmp_path}
    flags |= {"model_name_or_path": base, "use_shallow_deep": True, "shallow_exit_layer": 2, method: True}
    argv = as_argv(**flags, **{stage: True}, do_train=True if stage == "predict_with_generate" else None)
    parse_arguments(argv)
    monkeypatch.setattr("util.arguments.launched_processes", lambda: 2)
    with pytest.raises(UserError, match=f"--{method} learns from sample to sample.* without torchrun"):
        parse_arguments(argv)
