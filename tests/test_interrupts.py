"""Ctrl-C in every command: one line that says how to go on, exit code 130, no traceback; what kills leave."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pytest
from datasets import Dataset
from real_rows import ROOT
from tiny_runs import FREE, as_argv

import run
from gpt_eval import __main__ as gpt_eval
from models.errors import one_line_errors
from scripts import calibrate, distill_targets, sweep

MODEL = ["--model_name_or_path", "x", "--dataset_name", "debian_de_en"]
EXPORT = ["--run", "x", "--output_dir", "x", "--title", "x", "--train_script", "x"]
COMMANDS = {  # module: the work that is interrupted, the flags that lead there, and how to go on
    "run": ("parse_arguments", [], "evaluation by --resume_eval True"),
    "scripts.sweep": ("parse_groups", [], "--resume_eval True to continue"),
    "scripts.calibrate": ("parse_flags", [], "--resume_eval True to continue"),
    "scripts.choose_exit": ("parse_groups", [], "to start again"),
    "scripts.simulate_calibration": ("parse_groups", [], "to start again"),
    "scripts.learn_shortlist": ("open_checkpoint", [*MODEL, "--output_file", "x"], "to start again"),
    "scripts.report": ("read_folders", ["folder"], "to start again"),
    "scripts.train_tokenizer": ("train", [*MODEL[2:], "--output_dir", "x"], "to start again"),
    "scripts.distill_targets": ("distill", [*MODEL, "--output_file", "x.jsonl.gz"], "to start again"),
    "scripts.export_checkpoint": ("export", EXPORT, "to start again"),
    "scripts.export_custom_generate": ("export", ["--output_dir", "x"], "to start again"),
    "scripts.export_static": ("export", [*MODEL[:2], "--output_dir", "x"], "to start again"),
    "scripts.benchmark": ("benchmark", [], "to start again"),
    "scripts.benchmark_training": ("benchmark", [], "to start again"),
}


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", COMMANDS)
def test_interrupted_commands_say_how_to_go_on(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    work, flags, hint = COMMANDS[name]
    monkeypatch.setattr(module, work, interrupt)
    monkeypatch.setattr("sys.argv", [name, *flags])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    output = capsys.readouterr().err
    assert stopped.value.code == 130
    assert "Interrupted. Run the same command" in output and hint in output and "Traceback" not in output


def test_an_interrupted_distillation_is_not_taken_for_a_finished_one(monkeypatch, tmp_path):
    """train_debian_t5_free.sh asks whether the file is there."""
    answers = [[["zwei"]], KeyboardInterrupt, [["zwei"]], [["eins"]]]  # short sources first

    def decode(*_):
        answer = answers.pop(0)
        if answer is KeyboardInterrupt:
            raise answer
        return answer

    rows = Dataset.from_dict({"id": ["a", "b"], "source": ["one ", "two"], "target": ["eins", "zwei"]})
    monkeypatch.setattr(distill_targets, "open_teacher", lambda *_: None)
    monkeypatch.setattr(distill_targets, "load_training_rows", lambda *_: rows)
    monkeypatch.setattr(distill_targets, "decode_beams", decode)
    output = tmp_path / "distilled.jsonl.gz"
    argv = [*MODEL, "--output_file", str(output), "--batch_size", "1"]
    with pytest.raises(SystemExit):
        distill_targets.main(argv)
    assert list(tmp_path.iterdir()) == []
    distill_targets.main(argv)
    with gzip.open(output, "rt", encoding="utf8") as lines:
        written = [json.loads(line) for line in lines]
    assert written == [  # in the order of the rows
        {"id": "a", "source": "one ", "target": "eins"},
        {"id": "b", "source": "two", "target": "zwei"},
    ]


def test_interrupted_judges_keep_their_answers(monkeypatch, capsys):
    monkeypatch.setattr(gpt_eval, "read_requests", interrupt)
    assert gpt_eval.main(["run", "--model", "m"]) == 130
    assert capsys.readouterr().err == (
        "\nInterrupted. Run the same command to continue: what is answered stays.\n"
    )


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_a_sweep_that_begins_leaves_nothing_of_an_earlier_one(tmp_path, monkeypatch):
    """Else a report after a kill would show old figures under new settings."""
    rows = tmp_path / "rows.csv"
    rows.write_text("de,en\nHaus,house\n")
    folder = tmp_path / "sweep"
    folder.mkdir()
    for name in ("settings.json", "sweep.json", "sweep.csv", "traces.jsonl", "report.html", "trade_off.svg"):
        (folder / name).write_text("of the earlier sweep")
    monkeypatch.setattr("util.evaluation.comparison.decode_rest", interrupt)
    files = ["--validation_file", str(rows), "--test_file", str(ROOT / "README.md"), "--split", "validation"]
    columns = ["--source_column", "de", "--target_column", "en", "--backend", "torch"]
    flags = ["--free", str(ROOT / "checkpoints/debian-t5-free"), "--methods", "FREE", *files, *columns]
    with pytest.raises(SystemExit):
        sweep.main(["--output_dir", str(folder), *flags])
    names = {"settings.json", "records.jsonl", "records.settings.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "records.jsonl").read_bytes() == b""
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["dataset"], settings["split"]) == (str(rows), "validation")


BATCHES = {"per_device_eval_batch_size": 4}  # three, of twelve rows


def interrupt_second(monkeypatch, target):
    """Let the second call of what `target` names be interrupted."""
    module, name = target.rsplit(".", 1)
    work, calls = getattr(importlib.import_module(module), name), []

    def stop(*arguments, **options):
        calls.append(name)
        return interrupt() if len(calls) == 2 else work(*arguments, **options)

    monkeypatch.setattr(target, stop)


def stop_in_the_middle(main, flags, monkeypatch):
    """Interrupt a program after its first batch."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        for module in ("decode", "comparison"):
            interrupt_second(patch, f"util.evaluation.{module}.describe_batch")
        main(as_argv(flags))


@pytest.mark.slow
def test_an_evaluation_that_begins_leaves_no_figures_of_an_earlier_one(base, monkeypatch):
    """Else a report would show them beside the new records."""
    flags = base | FREE | BATCHES | {"do_eval": True, "do_predict": True, "use_adapt_threshold": True}
    run.main(as_argv(flags))
    folder = Path(flags["output_dir"])
    settings = {"predictions.settings.json", "predictions_test.settings.json"}
    stop_in_the_middle(run.main, flags | {"shallow2deep_conf_threshold": 0.5}, monkeypatch)
    assert {path.name for path in folder.iterdir()} == settings | {
        "predictions.jsonl", "predictions_test.jsonl", "predictions_test.scores.jsonl",
        "predict_results.json", "adaptive_threshold_test.json",
    }  # fmt: skip
    assert (folder / "predictions.jsonl").read_text().count("\n") == 4


def test_a_threshold_that_is_learnt_further_stays_until_it_is_replaced(base, monkeypatch):
    flags = base | FREE | BATCHES | {"do_eval": True, "use_adapt_threshold": True}
    run.main(as_argv(flags))
    learnt = Path(flags["output_dir"], "adaptive_threshold.json")
    before = learnt.read_bytes()
    stop_in_the_middle(run.main, flags | {"adapt_threshold_file": str(learnt)}, monkeypatch)
    assert learnt.read_bytes() == before and not learnt.with_name("eval_results.json").exists()


@pytest.mark.slow
def test_a_calibration_that_begins_leaves_no_certificate_of_an_earlier_one(base, monkeypatch):
    flags = base | FREE | {"use_cpu": True, "delta": 0.5}
    folder = Path(flags["output_dir"])
    calibrate.main([*as_argv(flags), "--thresholds", "1.0", "0.5"])
    assert {"calibrated_threshold.json", "losses.npz"} < {path.name for path in folder.iterdir()}
    stop_in_the_middle(calibrate.main, flags, monkeypatch)
    assert {path.name for path in folder.iterdir()} == {"records.jsonl", "records.settings.json"}
