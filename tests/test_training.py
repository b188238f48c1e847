"""Training that survives: several processes, damaged checkpoints, full disks, resumption, determinism."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_models import padded_inputs, tiny_model
from transformers import AutoTokenizer

import run
from models.decoder_view import view_for
from models.loading import load_model
from models.losses import INTERMEDIATE_LOSSES, build_exit_loss
from util.trainer import EarlyExitTrainer, last_complete_checkpoint

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "task": "translation",
    "dataset_name": "debian_de_en",
    "max_source_length": 24,
    "max_target_length": 12,
}
QUIET = {"report_to": "none", "disable_tqdm": True}
FREE = {"intermediate_loss_fn": "shallowdeep_kd_dyna", "shallow_exit_layer": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    tiny_model(num_layers=4, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def as_argv(**flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


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


def torchrun(*argv, script="run.py"):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([*launcher, script, *argv], cwd=ROOT, env=environment, check=True, capture_output=True)


def test_two_processes_equal_one(base, tmp_path):
    """Training with half the batch in each process; a sharded evaluation, with FREE in batches."""
    loss = {"intermediate_loss_fn": "ce"}
    one = DATA | QUIET | {"do_eval": True, "max_eval_samples": 7, "per_device_eval_batch_size": 2}
    one |= {"use_shallow_deep": True, "shallow_exit_layer": 2, "shallow2deep_conf_threshold": 0.02}
    flags = train_flags(base, tmp_path / "two", per_device_train_batch_size=1)
    torchrun(*as_argv(**flags | loss | one))
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    weights = train(base, tmp_path / "one", **loss, **halves)
    assert_same(weights, load_model(str(tmp_path / "two")).model.state_dict())
    checked = one | {"model_name_or_path": tmp_path / "two", "output_dir": tmp_path / "check"}
    run.main(as_argv(**checked))
    for name in ("predictions.jsonl", "predictions.scores.jsonl"):
        lines = [(tmp_path / folder / name).read_text().splitlines() for folder in ("two", "check")]
        kept = [[drop_times(json.loads(line)) for line in part] for part in lines]
        assert kept[0] == kept[1] and len(kept[0]) == 7
    both = [json.loads((tmp_path / folder / "eval_results.json").read_text()) for folder in ("two", "check")]
    for name in ("bleu", "chrf", "average_layers", "exit_share", "tokens", "confidence_intervals"):
        assert both[0][name] == both[1][name]


def test_sharded_weights_have_the_same_loss_and_gradients():
    """FSDP of both versions, T5 and BART, on two CPU processes."""
    torchrun(script="tests/sharded_step.py")


def test_accelerate_accepts_the_configuration_for_sharded_training(monkeypatch):
    path = str(ROOT / "scripts/accelerate/fsdp.yaml")
    flags = launch_command_parser().parse_args(["--config_file", path, "run.py", "--do_train"])
    flags = _validate_launch_command(flags)[0]
    assert flags.use_fsdp
    for name, value in prepare_multi_gpu_env(flags).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.transformer_cls_names_to_wrap) == (1, ["T5Block"])
    assert "FULL_SHARD" in str(plugin.sharding_strategy) and "FULL" in str(plugin.state_dict_type)


def drop_times(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "calibration")}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a finished run and its weights."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(base, folder)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "gone"),
        ("optimizer.pt", "cut"),
        ("rng_state.pth", "cut"),
        ("trainer_state.json", "cut"),
        ("trainer_state.json", "gone"),
    ],
)
def test_damaged_checkpoints_are_passed_over(base, finished, tmp_path, caplog, file, damage):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-6" / file
    content = newest.read_bytes()
    newest.unlink()
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    assert last_complete_checkpoint(str(tmp_path / "run")).endswith("checkpoint-3")
    assert "checkpoint-6 is damaged" in caplog.text
    (tmp_path / "run" / "model.safetensors").unlink()
    assert_same(finished[1], train(base, tmp_path / "run"))


DYING_RUN = """
import os, signal, sys
from pathlib import Path
import run
from util.trainer import EarlyExitTrainer

save = EarlyExitTrainer._save

def save_half_and_die(self, output_dir, *arguments):
    save(self, output_dir, *arguments)
    if output_dir.endswith("checkpoint-6"):
        weights = Path(output_dir, "model.safetensors")
        os.truncate(weights, weights.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

EarlyExitTrainer._save = save_half_and_die
run.main(sys.argv[1:])
"""


def test_a_kill_while_a_checkpoint_is_written_loses_no_older_one(base, finished, tmp_path, caplog):
    flags = as_argv(**train_flags(base, tmp_path / "run"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    died = subprocess.run(
        [sys.executable, "-c", DYING_RUN, *flags], cwd=ROOT, env=environment, capture_output=True
    )
    assert died.returncode == -signal.SIGKILL
    with caplog.at_level("INFO"):
        assert_same(finished[1], train(base, tmp_path / "run"))
    assert "checkpoint-6 is damaged" in caplog.text
    assert f"Continuing from {tmp_path / 'run' / 'checkpoint-3'}" in caplog.text


def test_a_full_disk_gets_one_line_and_loses_nothing(base, tmp_path, capsys, monkeypatch):
    save = EarlyExitTrainer._save

    def save_once(self, output_dir=None, state_dict=None):
        if str(output_dir).endswith("checkpoint-6"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output_dir, state_dict)

    with monkeypatch.context() as patch:
        patch.setattr(EarlyExitTrainer, "_save", save_once)
        with pytest.raises(SystemExit) as stop:
            train(base, tmp_path / "run")
    assert stop.value.code == 2 and "no space left" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoint-6", ignore_errors=True)
    assert_same(train(base, tmp_path / "whole"), train(base, tmp_path / "run"))


def test_equal_seeds_give_equal_runs_and_others_do_not(base, tmp_path):
    first, second, other = (
        train(base, tmp_path / name, seed=seed, save_strategy="no")
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_accumulated_gradients_equal_a_larger_batch(base, tmp_path):
    """Up to the weights of tokens: exit losses are means over each batch."""
    flags = {"optim": "sgd", "max_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    twice = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    small = train(base, tmp_path / "small", **flags, **twice)
    large = train(base, tmp_path / "large", **flags, per_device_train_batch_size=4)
    before = load_model(base).model.state_dict()
    moved = torch.cat([(small[name] - before[name]).flatten() for name in before])
    expected = torch.cat([(large[name] - before[name]).flatten() for name in before])
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.99
    assert 0.9 < moved.norm() / expected.norm() < 1.1


@pytest.mark.parametrize("shape", ["t5-tied", "umt5", "longt5-tglobal", "bart-tied", "pegasus"])
@pytest.mark.parametrize("name", INTERMEDIATE_LOSSES)
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


def test_best_model_is_chosen_by_the_task_and_training_stops_early(base, tmp_path):
    flags = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 30,
        "max_eval_samples": 3,
        "predict_with_generate": True,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "learning_rate": 1e-9,
        "save_total_limit": 3,
    }
    train(base, tmp_path, **flags)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] < 30
    assert {"eval_bleu"} <= set().union(*state["log_history"])
    assert state["best_global_step"] == 1


def test_streamed_training_runs_and_needs_max_steps(base, tmp_path, capsys):
    train(base, tmp_path / "run", streaming=True, save_strategy="no")
    with pytest.raises(SystemExit):
        run.main(as_argv(**train_flags(base, tmp_path / "other", streaming=True, max_steps=-1)))
    assert "--max_steps" in capsys.readouterr().err


def test_paper_settings_are_defaults_that_flags_override():
    from util.arguments import parse_arguments

    flags = {"model_name_or_path": "x", "task": "summarization", "dataset_name": "samsum", "do_eval": True}
    arguments = parse_arguments(as_argv(**flags, output_dir="/tmp", paper_settings=True, learning_rate=3e-4))
    training = arguments.training
    assert (training.optim, training.num_train_epochs, training.learning_rate) == ("adafactor", 20, 3e-4)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    flags["dataset_name"] = "debian_synopsis"
    with pytest.raises(ValueError, match="--paper_settings"):
        parse_arguments(as_argv(**flags, output_dir="/tmp", paper_settings=True))
