"""Training that survives: several processes, damaged checkpoints, full disks, resumption, determinism."""

from __future__ import annotations

import errno
import json
import shutil
import signal

import pytest
import torch
from programs import Program
from safetensors.torch import load_file
from training_runs import DATA, EVALUATED, QUIET, as_argv, assert_same, save_base, train, train_flags

import run
from util.arguments import parse_arguments
from util.evaluation.decode import describe_batch
from util.setup import read_split
from util.training.train import generation_score
from util.training.trainer import EarlyExitTrainer, last_complete_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a finished run and its weights."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(base, folder)


@pytest.mark.slow
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
    if file == "model.safetensors" and damage == "cut":  # the others are passed over just so
        assert_same(finished[1], train(base, tmp_path / "run"))


DYING_RUN = """
import os, signal, sys
from pathlib import Path
import run
from util.training.trainer import EarlyExitTrainer

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


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_loses_no_older_one(base, finished, tmp_path, caplog):
    (tmp_path / "dying_run.py").write_text(DYING_RUN)
    died = Program(tmp_path / "dying_run.py", *as_argv(**train_flags(base, tmp_path / "run")))
    died.wait()
    assert died.code == -signal.SIGKILL
    with caplog.at_level("INFO"):
        assert_same(finished[1], train(base, tmp_path / "run"))
    assert "checkpoint-6 is damaged" in caplog.text
    assert f"Continuing from {tmp_path / 'run' / 'checkpoint-3'}" in caplog.text


@pytest.mark.slow
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


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_others_do_not(base, tmp_path):
    first, second, other = (
        train(base, tmp_path / name, seed=seed, save_strategy="no")
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def contents(folder):
    """Every file of a training with its bytes and the time of its last change."""
    evaluation = ("predictions", "eval_results", "README")  # the model card tells their figures
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(evaluation)]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_best_model_is_chosen_by_the_task_and_training_stops_early(base, tmp_path):
    flags = EVALUATED | {"max_steps": 10, "early_stopping_patience": 2, "learning_rate": 1e-9}
    train(base, tmp_path, **flags, save_total_limit=3)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] < 10
    assert {"eval_bleu"} <= set().union(*state["log_history"])
    assert state["best_global_step"] == 1
    before = contents(tmp_path)
    train(base, tmp_path, **flags, save_total_limit=3)  # stopped early, it is finished
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_finished_training_changes_nothing_until_it_is_made_longer(base, finished, tmp_path, caplog):
    shutil.copytree(finished[0], tmp_path / "run")
    before = contents(tmp_path / "run")
    with caplog.at_level("INFO"):
        weights = train(base, tmp_path / "run", do_eval=True, backend="torch", max_eval_samples=2)
    assert "is finished" in caplog.text
    assert contents(tmp_path / "run") == before
    evaluated = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    alone = {
        "model_name_or_path": finished[0],
        "output_dir": tmp_path / "alone",
        "do_eval": True,
        "backend": "torch",
    }
    run.main(as_argv(**DATA | QUIET | alone, max_eval_samples=2))
    assert evaluated["chrf"] == json.loads((tmp_path / "alone" / "eval_results.json").read_text())["chrf"]
    assert_same(weights, finished[1])
    train(base, tmp_path / "run", max_steps=7)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 7


@pytest.mark.slow
def test_best_adapter_is_saved_with_its_own_exit_heads(base, tmp_path):
    flags = EVALUATED | {"predict_with_generate": False, "max_steps": 3, "metric_for_best_model": "loss"}
    flags |= {"greater_is_better": True, "use_lora": True, "per_exit_head": "norm"}  # the first is "best"
    train(base, tmp_path, **flags)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    heads = [
        load_file(folder / "exit_heads.safetensors")
        for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-3")
    ]
    for name, weight in heads[1].items():
        assert torch.equal(heads[0][name], weight) and not torch.equal(heads[2][name], weight)


@pytest.mark.slow
def test_generation_config_of_a_checkpoint_gives_way_to_the_flags(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    settings = {"num_beams": 4, "max_new_tokens": 22, "decoder_start_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings | {"pad_token_id": 0}))
    lengths = []

    def spy(loaded, batch, decoded):
        lengths.extend(map(len, decoded.sequences))
        return describe_batch(loaded, batch, decoded)

    monkeypatch.setattr("util.training.train.describe_batch", spy)
    flags = EVALUATED | {"max_steps": 1, "val_max_target_length": 5}
    train(str(tmp_path / "base"), tmp_path / "run", **flags)
    assert len(lengths) == 3 and max(lengths) == 4  # and the start token
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert kept["num_beams"] == 4 and kept["max_new_tokens"] == 22


def test_each_evaluation_while_training_begins_with_the_same_threshold(base, tmp_path, monkeypatch):
    """What was learnt of earlier weights is not carried on to later ones, which it would tell of falsely."""
    flags = EVALUATED | {"use_shallow_deep": True, "use_adapt_threshold": True}
    flags |= {"shallow2deep_conf_threshold": 0.01}
    arguments = parse_arguments(as_argv(**train_flags(base, tmp_path, **flags, per_device_eval_batch_size=1)))
    loaded, exit_flags = run.open_model(arguments)
    examples = read_split(arguments.data, "validation", loaded, 3)
    thresholds = []

    def spy(loaded, batch, decoded):
        thresholds.append(decoded.threshold)
        return describe_batch(loaded, batch, decoded)

    monkeypatch.setattr("util.training.train.describe_batch", spy)
    evaluate = generation_score(arguments, exit_flags, loaded, examples)
    assert evaluate() == evaluate()
    assert thresholds[0] != thresholds[1] and thresholds[:3] == thresholds[3:]


@pytest.mark.parametrize(
    ("given", "best", "greater"), [(None, "bleu", True), ("loss", "loss", False), ("chrf", "chrf", True)]
)
def test_the_best_model_is_the_one_by_the_metric_that_is_named(base, tmp_path, given, best, greater):
    flags = train_flags(base, tmp_path, **EVALUATED, metric_for_best_model=given)
    arguments = parse_arguments(as_argv(**flags))
    arguments.connect()
    training = arguments.training
    assert (training.metric_for_best_model, training.greater_is_better) == (best, greater)


def write_questions(path, answers):
    """Long contexts, of several windows each, and the answers to one question on each."""
    words = [" ".join(f"{word} {number}" for number in range(40)) for word in ("alpha", "beta", "gamma")]
    rows = [
        {"id": f"q{row}", "question": "Which one?", "context": text, "answers": {"text": answer}}
        for row, (text, answer) in enumerate(zip(words, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, {"use_shallow_deep": True, "shallow2deep_conf_threshold": 0.01}])
def test_questions_are_scored_while_training_as_by_do_eval(base, tmp_path, method):
    """All references count, and windows are samples together: answers that the model gives score 100."""
    rows = tmp_path / "rows.jsonl"
    write_questions(rows, [["alpha 1"], ["beta 2"], ["gamma 3"]])
    shared = QUIET | {"task": "question_answering", "max_source_length": 64, "doc_stride": 16}
    shared |= {"max_target_length": 8, "validation_file": rows, "train_file": rows, **method}
    before = {
        "model_name_or_path": base,
        "do_eval": True,
        "backend": "torch",
        "output_dir": tmp_path / "before",
    }
    run.main(as_argv(**shared | before, shallow_exit_layer=2 if method else None))
    lines = map(json.loads, (tmp_path / "before" / "predictions.jsonl").read_text().splitlines())
    windows = list(lines)
    assert len(windows) > 3
    best = {}
    for row in sorted(windows, key=lambda row: row["sequence_score"]):
        best[row["id"]] = row["prediction"]
    answers = tmp_path / "answers.jsonl"
    write_questions(answers, [["something else", best[f"q{row}"]] for row in range(3)])
    flags = EVALUATED | shared | {"validation_file": answers, "learning_rate": 1e-12, "max_steps": 1}
    flags |= {"dataset_name": None, "per_device_eval_batch_size": 8}
    train(base, tmp_path / "run", **flags)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    evaluated = next(row for row in state["log_history"] if "eval_f1" in row)
    given = sum(bool(answer.strip()) for answer in best.values())  # an empty answer is no reference
    assert given >= 2 and evaluated["eval_exact_match"] == pytest.approx(100 * given / 3)


@pytest.mark.slow
def test_streamed_training_runs_and_needs_max_steps(base, tmp_path, capsys):
    train(base, tmp_path / "run", streaming=True, save_strategy="no")
    with pytest.raises(SystemExit):
        run.main(as_argv(**train_flags(base, tmp_path / "other", streaming=True, max_steps=-1)))
    assert "--max_steps" in capsys.readouterr().err


def test_paper_settings_are_defaults_that_flags_override():
    flags = {"model_name_or_path": "x", "task": "summarization", "dataset_name": "samsum", "do_eval": True}
    arguments = parse_arguments(as_argv(**flags, output_dir="/tmp", paper_settings=True, learning_rate=3e-4))
    training = arguments.training
    assert (training.optim, training.num_train_epochs, training.learning_rate) == ("adafactor", 20, 3e-4)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 8
    flags["dataset_name"] = "debian_synopsis"
    with pytest.raises(ValueError, match="--paper_settings"):
        parse_arguments(as_argv(**flags, output_dir="/tmp", paper_settings=True))
