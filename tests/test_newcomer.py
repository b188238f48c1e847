"""The first commands of a newcomer: help, misspelt names, settings for random weights, scripts' set-up."""

from __future__ import annotations

import ast
import dataclasses
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import Seq2SeqTrainingArguments

import models
from models import UserError, load_model
from models.exit_heads import ExitConfig, attach_exit_heads
from scripts import calibrate, check_requirements, choose_exit, learn_shortlist, sweep, train_tokenizer
from util import script_arguments
from util.arguments import OUR_GROUPS, parse_arguments
from util.backend_arguments import BackendArguments
from util.calibration import risk_control as calibration
from util.console import prepare_console
from util.data_arguments import DataArguments, require_split
from util.flag_help import TRAINING_FLAGS
from util.sweep_arguments import SweepArguments
from util.training.trainer import without_tied

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (sweep, calibrate, choose_exit, learn_shortlist, train_tokenizer)


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_of_main_is_the_same(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0 and "--train_file TEXT" in capsys.readouterr().out


def test_help_names_flags_that_exist():
    known = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert set(TRAINING_FLAGS) <= known
    assert set(script_arguments.CERTIFIERS) == set(calibration.METHODS)
    assert set(script_arguments.P_VALUES) == set(calibration.P_VALUES)


def test_package_offers_what_it_names():
    assert all(hasattr(models, name) for name in models.__all__)
    source = ast.parse(Path(models.__file__).read_text())
    (typed,) = [node for node in source.body if isinstance(node, ast.If)]  # what editors and checkers read
    homes = {line.module: tuple(alias.name for alias in line.names) for line in typed.body}
    assert homes == models.HOMES
    with pytest.raises(AttributeError, match="no attribute 'Flee'"):
        models.Flee  # noqa: B018


@pytest.mark.parametrize(
    "name, meant", [("samsun", "samsum"), ("multi-news", "multi_news"), ("SAMSum", "samsum")]
)
def test_misspelt_data_sets_get_a_suggestion(name, meant):
    with pytest.raises(UserError, match=f"--dataset_name {name}: did you mean {meant}"):
        DataArguments(task="summarization", dataset_name=name)


@pytest.mark.parametrize("name", ["samsum", "xsum", "someone/samsun"])
def test_other_data_sets_are_left_to_the_hub(name):
    assert DataArguments(task="summarization", dataset_name=name).dataset_name == name


def test_a_lone_split_suggests_itself(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\nx,y\n")
    with pytest.raises(UserError, match=r"no --test_file: .* --validation_file with --split validation"):
        data = DataArguments(validation_file=str(rows))
        sweep.sweep(SweepArguments(free="x"), data, BackendArguments())
    with pytest.raises(UserError, match="decode --test_file with --split test"):
        require_split(DataArguments(test_file=str(rows)), "validation")
    require_split(DataArguments(test_file=str(rows)), "test")


def test_csv_without_the_columns_of_the_default_task_names_the_task(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,title\nx,y\n")
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--train_file", str(rows), "--output_dir", str(tmp_path)])
    assert (
        "found text, title. Name yours with --source_column, or the task with --task (here translation)"
        in (capsys.readouterr().err)
    )


def test_too_large_vocabulary_gets_one_line(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,title\nan apple,apple\na pear,pear\n")
    flags = ["--task", "summarization", "--source_column", "text", "--target_column", "title"]
    with pytest.raises(SystemExit) as stop:
        train_tokenizer.main([*flags, "--train_file", str(rows), "--output_dir", str(tmp_path)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: --vocab_size 4096 does not suit these texts")


@pytest.mark.parametrize(
    "words, learning_rate, told",
    [
        ("--config_name c --tokenizer_name t --do_train", 1e-3, True),
        ("--config_name=c --tokenizer_name t --do-train --learning-rate 3e-4", 3e-4, True),
        ("--config_name c --tokenizer_name t --do_train --paper_settings False", 1e-3, True),
        ("--config_name c --tokenizer_name t --do_train --paper_settings", 1e-4, False),  # the paper's, of t5
        ("--model_name_or_path m --do_train", 5e-5, False),  # the Trainer's own
    ],
)
def test_random_weights_get_settings_of_their_own(words, learning_rate, told, caplog):
    more = ["--dataset_name", "samsum", "--output_dir", "out", "--use_cpu"]
    with caplog.at_level(logging.INFO):
        training = parse_arguments([*words.split(), *more]).training
    assert training.learning_rate == learning_rate
    assert (training.logging_steps == 10) == (learning_rate in (1e-3, 3e-4))
    assert ("Random weights" in caplog.text) == told


def test_settings_of_random_weights_are_announced_to_those_who_train(caplog, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text(
        "config_name: c\ntokenizer_name: t\npaper_settings: false\ndo_train: false\ndo_eval: true\n"
    )
    more = ["--dataset_name", "samsum", "--output_dir", "out", "--use_cpu"]
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match="add --do_train"):
        parse_arguments([str(file), *more])
    assert "Random weights" not in caplog.text


def test_exit_heads_are_no_surprise(tmp_path, caplog, monkeypatch):
    """transformers' table of unexpected weights stays away; what does not fit is an error as before."""
    model = tiny_model()
    attach_exit_heads(model, ExitConfig("shallowdeep_ce", 2, train_meta_cm_head=True))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr("models.loading.load_tokenizer", lambda *_, **__: None)
    load_model(str(tmp_path))
    assert "LOAD REPORT" not in caplog.text
    model.cm_head, model.stray = torch.nn.Identity(), torch.nn.Linear(1, 1)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"unexpected: stray\.bias, stray\.weight"):
        load_model(str(tmp_path))


def test_tied_weights_are_not_missing():
    model = tiny_model("t5-tied")
    tied = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    norm = "encoder.final_layer_norm.weight"
    assert without_tied([*tied, norm], model) == [norm]
    assert without_tied([*tied, "shared.weight"], model) == [*tied, "shared.weight"]  # none is there
    assert without_tied(["lm_head.weight"], tiny_model("bart-untied")) == ["lm_head.weight"]


def test_deprecations_are_dropped_and_warnings_kept():
    with warnings.catch_warnings(record=True) as found:
        prepare_console()
        warnings.warn("an old name", FutureWarning, stacklevel=1)
        warnings.warn("not finite", UserWarning, stacklevel=1)
    assert [str(one.message) for one in found] == ["not finite"]
    handler = logging.getLogger("transformers").handlers[0]
    shown = [text for text in ("`old` is deprecated", "not finite") if handler.filter(as_record(text))]
    assert shown == ["not finite"]


def as_record(text):
    return logging.makeLogRecord({"msg": text, "levelno": logging.WARNING})


def test_requirements_are_compared_with_what_is_installed():
    lines = ["# a comment", "", "torch>=2", "torch>=99", "no-such-package==1"]
    found = [*check_requirements.find_missing(lines)]
    assert found == [f"torch>=99 (has {torch.__version__})", "no-such-package==1"]


def test_scripts_take_the_active_environment(tmp_path):
    """Without .venv and its making: only `python` of the active one is asked."""
    for name in ("scripts/environment.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "scripts/check_requirements.py").write_text("")
    folder = Path(sys.executable).parent
    variables = {"VIRTUAL_ENV": str(folder.parent), "PATH": f"{folder}:{os.environ['PATH']}"}
    command = "source scripts/environment.sh; command -v python"
    shown = subprocess.check_output(
        ["bash", "-euc", command], cwd=tmp_path, env=os.environ | variables, text=True
    )
    assert shown.strip() == str(folder / "python") and not (tmp_path / ".venv").exists()


def test_groups_of_run_have_titles():
    assert all(group._argument_group_name for group in OUR_GROUPS)
