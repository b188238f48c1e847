"""Runs that were killed, or whose data, weights or flags changed, or that meet another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import Program
from real_rows import ROOT
from tiny_models import tiny_model
from tiny_runs import (
    FREE,
    TRAINING,
    as_argv,
    losses_of,
    refused,
    results_of,
)
from transformers import AutoTokenizer

import run
from models.errors import UserError
from models.loading import load_model
from util.arguments import parse_arguments
from util.data_arguments import DataArguments
from util.evaluation.comparison import restore
from util.evaluation.identity import total
from util.evaluation.prediction_log import PredictionLog
from util.evaluation.records import Record
from util.files import locked_output_dir
from util.training.identity import (
    IDENTITY_FILE,
    identify_training,
    named_settings,
    refuse_other_training,
)


def kill_when(condition, flags, seconds=120):
    """Start run.py with these flags, and kill it once the condition holds."""
    program, deadline = Program("run.py", *as_argv(flags)), time.monotonic() + seconds
    try:
        while not condition():
            assert program.code is None and time.monotonic() < deadline, "ended before it could be killed"
            time.sleep(0.002)
    finally:
        program.kill()
    program.wait()
    assert program.code == -signal.SIGKILL


@pytest.mark.slow
def test_killed_training_continues_with_the_same_losses(base, tmp_path):
    flags = (
        base | TRAINING | {"max_steps": 24, "save_steps": 4, "intermediate_loss_fn": "shallowdeep_kd_unif"}
    )
    flags |= {"shallow_exit_layer": 2}
    killed = flags | {"output_dir": str(tmp_path / "killed")}
    kill_when(Path(killed["output_dir"], "checkpoint-8", "trainer_state.json").exists, killed)
    steps = [int(path.name[11:]) for path in Path(killed["output_dir"]).glob("checkpoint-*")]
    newest = Path(killed["output_dir"], f"checkpoint-{max(steps)}")
    (newest / "trainer_state.json").write_text('{"half": ')  # as if killed while this was written
    for folder in (flags, killed):
        run.main(as_argv(folder))
    expected, continued = losses_of(flags["output_dir"]), losses_of(killed["output_dir"])
    assert len(continued) == 24 and continued == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_killed_evaluation_continues_to_the_same_result(base, rows, tmp_path):
    many = tmp_path / "many.jsonl"
    lines = rows.read_text().splitlines() * 8
    many.write_text("\n".join(json.dumps(json.loads(line) | {"id": str(i)}) for i, line in enumerate(lines)))
    flags = base | FREE | {"use_adapt_threshold": True, "do_eval": True, "validation_file": str(many)}
    flags |= {"per_device_eval_batch_size": 1, "resume_eval": True, "adapt_zeta": 0.1}
    killed = flags | {"output_dir": str(tmp_path / "killed")}
    log = Path(killed["output_dir"], "predictions.jsonl")
    kill_when(lambda: log.is_file() and log.read_text().count("\n") > 20, killed)
    done = log.read_text().splitlines()
    assert len(done) < len(lines)
    log.write_text("\n".join(done[:20]) + "\n" + done[20][:30])  # a line cut in half
    for settings in (flags, killed):
        run.main(as_argv(settings))
    timed = ("seconds", "seconds_per_sample_median", "tokens_per_second", "ms_per_token")
    results = [
        {name: value for name, value in results_of(settings).items() if name not in timed}
        for settings in (flags, killed)
    ]
    assert results[0] == results[1]
    assert log.read_text().splitlines()[:20] == done[:20]


def test_resume_can_be_switched_on_later(base, tmp_path):
    flags = base | {"do_eval": True}
    run.main(as_argv(flags))
    log = Path(flags["output_dir"], "predictions.jsonl")
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    run.main(as_argv(flags | {"resume_eval": True}))
    ours, theirs = ([json.loads(line) for line in data.splitlines()] for data in (log.read_bytes(), whole))
    assert [row["prediction"] for row in ours] == [row["prediction"] for row in theirs]


@pytest.mark.slow
def test_an_evaluation_that_chose_its_settings_by_time_does_not_continue(base, capsys):
    flags = base | FREE | {"do_eval": True, "auto_exit": True, "per_device_eval_batch_size": 1}
    run.main(as_argv(flags))
    log = Path(flags["output_dir"], "predictions.jsonl")
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:5]))
    line = refused(flags | {"resume_eval": True}, capsys)
    assert "--auto_exit learn anew after 5 outputs" in line and "--resume_eval False" in line
    assert log.read_text() == "".join(whole[:5])
    log.write_text("".join(whole))  # nothing is left to learn for
    run.main(as_argv(flags | {"resume_eval": True}))
    assert log.read_text() == "".join(whole)


def test_resuming_with_other_weights_is_refused(base, tmp_path, capsys):
    run.main(as_argv(base | {"do_eval": True}))
    other = tmp_path / "other"
    shutil.copytree(base["model_name_or_path"], other)
    tiny_model(seed=9).save_pretrained(other)
    with pytest.raises(SystemExit):
        run.main(as_argv(base | {"do_eval": True, "resume_eval": True, "model_name_or_path": str(other)}))
    assert "weights" in capsys.readouterr().err


@pytest.mark.slow
def test_continuing_a_training_with_another_loss_is_refused(base, capsys):
    flags = base | TRAINING | {"intermediate_loss_fn": "weighted_ce"}
    run.main(as_argv(flags))
    with pytest.raises(SystemExit):
        run.main(as_argv(flags | {"intermediate_loss_fn": "shallowdeep_ce", "shallow_exit_layer": 3}))
    assert "other exit settings" in capsys.readouterr().err


def test_resuming_with_other_flags_is_refused(base, capsys):
    flags = base | {"do_eval": True, "resume_eval": True}
    run.main(as_argv(flags))
    with pytest.raises(SystemExit):
        run.main(as_argv(flags | {"static_exit_layer": 2}))
    assert "static_exit_layer" in capsys.readouterr().err


def test_log_drops_only_the_line_that_was_cut(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PredictionLog(path, {"a": 1}) as log:
        rest = {"reference": "", "tokens": 1, "pieces": ["a"], "exit_layers": None, "seconds": 1.0}
        log.append([Record("1", "a\u2028b", **rest), Record("2", "", **rest)])
    with path.open("a") as file:
        file.write('{"id": "3 \u2028 ü')
    path.write_bytes(path.read_bytes()[:-1])  # within a character
    with PredictionLog(path, {"a": 1}, resume=True) as log:
        assert log.records == [Record("1", "a\u2028b", **rest), Record("2", "", **rest)]


@pytest.mark.parametrize(("done", "kept"), [(3, 0), (5, 4), (8, 8), (9, 8), (10, 10)])
@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_a_comparison_goes_on_after_whole_blocks(names, done, kept):
    """Ten samples in batches of four; only the last batch is a short one."""
    rest = {"reference": "", "tokens": 1, "pieces": ["a"], "exit_layers": None, "seconds": 1.0}
    records = [
        Record(str(row), "", **rest, setting=name, row=row) for row in range(20, 20 + done) for name in names
    ]
    settings = [SimpleNamespace(name=name, batch_size=4, policy=None) for name in names]
    held = []
    log = SimpleNamespace(records=records, keep=held.extend)
    assert restore(settings, log, range(20, 30)) == range(20 + kept, 30)
    assert held == records[: kept * len(names)]
    assert [len(setting.records) for setting in settings] == [kept] * len(names)


def replace_unnoticed(path, content):
    """Other content under the same time stamp."""
    stamp = path.stat()
    path.write_text(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


CHANGES = {
    "reference": lambda text: text.replace("the package", "the library", 1),
    "source": lambda text: text.replace("ein das", "das ein", 1),
    "id": lambda text: text.replace("row-11", "row-99"),
    "fewer rows": lambda text: "".join(text.splitlines(keepends=True)[:2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_an_evaluation_does_not_continue_on_changed_data(base, rows, tmp_path, capsys, name):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    flags = base | {"do_eval": True, "validation_file": str(data), "per_device_eval_batch_size": 4}
    run.main(as_argv(flags))
    before = Path(flags["output_dir"], "predictions.jsonl").read_bytes()
    changed = CHANGES[name](data.read_text())
    assert changed != data.read_text()
    replace_unnoticed(data, changed)
    assert "other samples" in refused(flags | {"resume_eval": True}, capsys)
    assert Path(flags["output_dir"], "predictions.jsonl").read_bytes() == before
    run.main(as_argv(flags))
    assert results_of(flags)["samples"] == changed.count("\n")


def test_an_evaluation_does_not_continue_with_another_tokenizer_or_configuration(base, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(base["model_name_or_path"], model)
    flags = base | {"do_eval": True, "resume_eval": True, "model_name_or_path": str(model)}
    run.main(as_argv(flags))
    run.main(as_argv(flags))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"relative_attention_max_distance": 2}))
    assert "other configuration" in refused(flags, capsys)
    (model / "config.json").write_text(json.dumps(settings))
    pieces = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(pieces.replace("▁ein", "▁kein"))
    assert "other tokenizer" in refused(flags, capsys)


@pytest.mark.slow
def test_an_evaluation_does_not_continue_with_another_threshold_file(base, tmp_path, capsys):
    flags = base | FREE | {"do_eval": True, "use_adapt_threshold": True}
    run.main(as_argv(flags))
    file = tmp_path / "threshold.json"
    shutil.copy(Path(flags["output_dir"], "adaptive_threshold.json"), file)
    flags |= {"adapt_threshold_file": str(file), "resume_eval": True, "output_dir": str(tmp_path / "second")}
    run.main(as_argv(flags))
    content = json.loads(file.read_text())
    content["observed"]["num_sequences"] += 1
    file.write_text(json.dumps(content))
    assert "other content of adapt_threshold_file" in refused(flags, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_training_does_not_continue_on_changed_rows(base, rows, tmp_path, capsys, streaming):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows, data)
    flags = base | TRAINING | {"max_steps": 2, "train_file": str(data), "streaming": streaming}
    run.main(as_argv(flags))
    run.main(as_argv(flags | {"max_steps": 4}))  # more steps are no other rows
    assert set(losses_of(flags["output_dir"])) == {1, 2, 3, 4}
    replace_unnoticed(data, CHANGES["reference"](data.read_text()))
    assert "other training rows" in refused(flags | {"max_steps": 6}, capsys)


OTHER_SETTINGS = {
    "lora_rank": 8,
    "lora_alpha": 64,
    "lora_dropout": 0.5,
    "lora_target_modules": "q",
    "warmup_steps": 3,
    "max_grad_norm": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "data_seed": 7,
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_training_continues_with_the_settings_by_which_weights_follow(base, tmp_path, name):
    flags = base | TRAINING | {"use_lora": True}
    begun = named_settings(parse_arguments(as_argv(flags)))
    (tmp_path / IDENTITY_FILE).write_text(json.dumps(begun))
    checkpoint = str(tmp_path / "checkpoint-2")
    refuse_other_training(checkpoint, begun)
    others = named_settings(parse_arguments(as_argv(flags | {name: OTHER_SETTINGS[name]})))
    with pytest.raises(UserError, match=f"was begun with other --{name}: use those again"):
        refuse_other_training(checkpoint, others)


def test_what_an_older_training_did_not_record_is_named(tmp_path, caplog):
    file, checkpoint = tmp_path / IDENTITY_FILE, str(tmp_path / "checkpoint-2")
    file.write_text(json.dumps({"tokenizer": "a", "--seed": "1"}))
    refuse_other_training(checkpoint, {"tokenizer": "a", "--seed": "1", "--lora_rank": "4"})
    assert f"{file} does not record --lora_rank: whether" in caplog.text
    with pytest.raises(UserError, match="was begun with other --seed: use"):
        refuse_other_training(checkpoint, {"--lora_rank": "4", "--seed": "2"})
    file.write_text('{"tokenizer": ')
    with pytest.raises(UserError, match=f"{IDENTITY_FILE}: not JSON"):
        refuse_other_training(checkpoint, {"tokenizer": "a"})


def test_streamed_questions_are_other_ones_with_another_stride(base, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Who?", "context": "c", "answers": "c"}))
    found = []
    for stride in (4, 8, 4):
        data = DataArguments(
            task="question_answering",
            train_file=str(tmp_path / "rows.jsonl"),
            streaming=True,
            doc_stride=stride,
        )
        trainer = SimpleNamespace(processing_class=AutoTokenizer.from_pretrained(base["model_name_or_path"]))
        found.append(identify_training(data, trainer, None))
    assert found[0] != found[1] and found[0] == found[2]


@pytest.mark.slow
def test_training_does_not_continue_from_other_weights_or_settings(base, tmp_path, capsys):
    flags = base | TRAINING | {"max_steps": 2}
    run.main(as_argv(flags))
    longer = flags | {"max_steps": 4}
    assert "was begun with other --learning_rate: use those" in refused(
        longer | {"learning_rate": 0.5}, capsys
    )
    loaded = load_model(flags["model_name_or_path"])
    with torch.no_grad():
        next(loaded.model.parameters()).add_(0.1)
    shutil.copytree(flags["model_name_or_path"], tmp_path / "other")
    loaded.model.save_pretrained(tmp_path / "other")
    others = {"model_name_or_path": str(tmp_path / "other")}
    assert "was begun with other starting weights" in refused(longer | others, capsys)
    assert set(losses_of(flags["output_dir"])) == {1, 2}
    run.main(as_argv(longer | {"per_device_train_batch_size": 1}))  # as where memory was short
    assert set(losses_of(flags["output_dir"])) == {1, 2, 3, 4}


def test_a_second_run_on_one_output_folder_is_refused(base, capsys, monkeypatch):
    flags = base | {"do_eval": True}
    folder = Path(flags["output_dir"])
    with locked_output_dir(folder):
        assert f"--output_dir {folder}: another run is writing there" in refused(flags, capsys)
        monkeypatch.setenv("RANK", "1")  # another process of the run that holds the lock
        with locked_output_dir(folder):
            assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock.1"]
        monkeypatch.delenv("RANK")
        assert "another run" in refused(flags, capsys)
    run.main(as_argv(flags))
    assert not [path.name for path in folder.iterdir() if "lock" in path.name]


def test_a_lock_that_a_killed_run_left_is_no_obstacle(base):
    flags = base | {"do_eval": True}
    lock = Path(flags["output_dir"], ".lock")
    code = (
        "import sys, time; from pathlib import Path; from util.files import locked\n"
        f"with locked(Path({str(lock)!r}), ''):\n    print('held', flush=True); time.sleep(600)"
    )
    lock.parent.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run is writing"), locked_output_dir(lock.parent):
        pass
    holder.kill()
    holder.wait()
    assert lock.exists()
    run.main(as_argv(flags))
    assert results_of(flags)["samples"] == 12


class WithoutFloat64(torch.Tensor):
    """As on a device of Apple's."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_weights_are_told_apart_on_devices_without_float64():
    assert total(torch.tensor([1.5, 2.0]).as_subclass(WithoutFloat64)) == 3.5
