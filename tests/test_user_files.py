"""Every file that a user hands over: damaged in any way it is answered by one line that names it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_eval.judgements import load_prompt, read_requests
from gpt_eval.predictions import read_predictions, read_source_file
from models.errors import one_line_errors
from models.exit_heads import ExitConfig
from models.loading import check_config
from models.threshold import AdaptiveThreshold
from util.arguments import parse_arguments
from util.calibration.certificate import CalibratedThreshold
from util.evaluation.summary import read_baseline
from util.exit_arguments import ExitArguments
from util.flags import expand_argument_file
from util.policies import free_threshold, read_shortlist
from util.report.folders import read_folders

CERTIFICATE = {
    "threshold": 0.5,
    "delta": 0.1,
    "epsilon": 0.05,
    "method": "ltt",
    "p_value": None,
    "consistency": "textual",
    "fastest_by": "layers",
    "samples": 9,
    "needed_samples": None,
    "model": {"weights": "0", "configuration": "0", "tokenizer": "0"},
    "data": {"hash": "0"},
    "settings": {},
    "candidates": [],
    "environment": {},
}
TEXTS = {"summary": "a", "source": "b"}
SWEEP = {"settings": [], "dataset": "d", "split": "test", "main_score": "bleu", "samples": 0}


def read_adapted(path):
    flags = ExitArguments(
        use_shallow_deep=True,
        shallow_exit_layer=1,
        use_adapt_threshold=True,
        adapt_threshold_file=str(path),
    )
    threshold = free_threshold(flags)
    return threshold.value, list(threshold.pairs)


def adapted(folder):
    path = folder / "saved.json"
    AdaptiveThreshold(0.5).save(path)
    return path.read_text()


READERS = {  # name of the file: what reads it, and what it should hold
    "exit_config.json": (lambda path: ExitConfig.load(path.parent), '{"shallow_exit_layer": 2}'),
    "config.json": (lambda path: check_config(str(path)), '{"model_type": "t5"}'),
    "model_config.json": (lambda path: check_config(str(path)), '{"model_type": "t5"}'),
    "adaptive_threshold.json": (read_adapted, adapted),
    "calibrated.json": (lambda path: CalibratedThreshold.load(path), json.dumps(CERTIFICATE)),
    "shortlist.json": (lambda path: read_shortlist(path).tolist(), '{"token_ids": [3, 4]}'),
    "baseline.jsonl": (read_baseline, '{"id": "1", "prediction": "x", "reference": "y"}\n'),
    "arguments.json": (lambda path: expand_argument_file([str(path)]), '{"seed": 1}'),
    "arguments.yaml": (lambda path: expand_argument_file([str(path)]), "seed: 1\n"),
    "settings.json": (lambda path: read_folders([path.parent]), json.dumps(SWEEP)),
    "sweep.json": (lambda path: read_folders([path.parent]), '{"rows": []}'),
    "scores.json": (lambda path: read_folders([path.parent]), '{"judges": {}}'),
    "predictions.jsonl": (read_predictions, '{"id": "1", "prediction": "x"}\n'),
    "predictions.csv": (read_predictions, "id,prediction\r\n001,x\r\n"),
    "sources.jsonl": (lambda path: read_source_file(path, "document", None), '{"id": 1, "document": "x"}\n'),
    "sources.csv": (lambda path: read_source_file(path, "document", None), "id,document\n01,x\n"),
    "requests.jsonl": (read_requests, None),
    "likert.txt": (
        lambda path: load_prompt(path.parent, "likert").messages(**TEXTS),
        "Rate $summary of $source",
    ),
}
DAMAGES = {
    "empty": b"",
    "binary": b"\x80\x04\x95\x00\xff\xfe",
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "utf-16": '{"seed": 1}'.encode("utf-16"),
    "cut": b'{"a": ',
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "text": b'"text"',
    "list of lists": b"[[1]]",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "digits": b"1" * 5000,
    "other object": b'{"token_ids": 1e999, "rows": 3, "judges": [], "settings": 1, "data": 5, "id": [1]}',
}
SERVES = {("config.json", "other object"), ("model_config.json", "other object")}
SERVES |= {("arguments.json", "other object"), ("arguments.yaml", "other object")}  # until it is parsed


def place(folder, name):
    """The file's path, in a folder that has what belongs to it."""
    if name in ("settings.json", "sweep.json"):
        (folder / "settings.json").write_text(json.dumps(SWEEP))
        (folder / "sweep.json").write_text('{"rows": []}')
    return folder / name


def complaint(capsys, read, *arguments):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        read(*arguments)
    output = capsys.readouterr().err
    assert stopped.value.code == 2 and output.startswith("error: ") and output.count("\n") == 1
    return output


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_named_in_one_line(tmp_path, capsys, name, damage):
    path = place(tmp_path, name)
    path.write_bytes(DAMAGES[damage])
    if (name, damage) in SERVES:
        READERS[name][0](path)
        return
    output = complaint(capsys, READERS[name][0], path)
    assert name in output and len(output) < 500


NEED_NOT_BE_THERE = {"exit_config.json", "config.json", "model_config.json", "sweep.json"}


@pytest.mark.parametrize("name", [name for name in READERS if name not in NEED_NOT_BE_THERE])
def test_missing_files_and_folders_in_their_place_are_named(tmp_path, capsys, name):
    path = place(tmp_path, name)
    path.unlink(missing_ok=True)
    for make in (lambda: None, path.mkdir):
        make()
        output = complaint(capsys, READERS[name][0], path)
        assert name in output or "no results here" in output


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_changes_nothing(tmp_path, name):
    read, content = READERS[name]
    if content is None:
        return
    path, found = place(tmp_path, name), []
    content = content if isinstance(content, str) else content(tmp_path)
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + content.encode())
        found.append(repr(read(path)))
    assert found[0] == found[1] and "ufeff" not in found[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("exit_config.json", {"per_exit_head": "mlp"}, "per_exit_head must be one of norm, projection"),
        ("exit_config.json", {"shallow_layer": 2}, "there is no setting shallow_layer"),
        ("exit_config.json", {"shallow_exit_layer": True}, "a whole number or null, not true"),
        ("exit_config.json", {"shallow_exit_layer": 2**63}, "or null, not 9223372036854775808"),
        ("exit_config.json", {"shallow_exit_layer": 0}, "shallow_exit_layer counts from 1, got 0"),
        ("exit_config.json", {"train_meta_cm_head": 1}, "train_meta_cm_head must be true or false, not 1"),
        ("exit_config.json", {"intermediate_loss_fn": "mse"}, "intermediate_loss_fn must be one of ce,"),
        ("config.json", {"d_model": 10**30}, "d_model 1000000000000000000000000000000 is too large"),
        ("calibrated.json", CERTIFICATE | {"threshold": "0.5"}, 'must be a number or null, not "0.5"'),
        ("calibrated.json", CERTIFICATE | {"data": {}}, "data lacks a hash"),
        ("calibrated.json", CERTIFICATE | {"model": "0"}, "configuration and tokenizer: calibrate again"),
        ("calibrated.json", CERTIFICATE | {"model": {"weights": "0"}}, "tokenizer: calibrate again"),
        ("calibrated.json", CERTIFICATE | {"settings": [1]}, "settings must be an object, not [1]"),
        ("calibrated.json", {"threshold": 0.5}, "it lacks delta"),
        ("shortlist.json", {"token_ids": [1, 2.5]}, "is not what scripts/learn_shortlist.py writes"),
        ("shortlist.json", {"token_ids": [1, 2**64]}, "is not what scripts/learn_shortlist.py writes"),
        ("baseline.jsonl", {"id": "1", "prediction": 5, "reference": ""}, "prediction must be a text, not 5"),
        ("scores.json", {"judges": {"m": 3}}, "judge 'm': expected a JSON object"),
        ("scores.json", {"judges": {"m": {"likert": []}}}, "likert must be an object, not []"),
        ("settings.json", SWEEP | {"settings": [{"name": 1}]}, "settings.json: lacks method"),
        ("settings.json", SWEEP | {"arguments": []}, "arguments must be an object, not []"),
        ("sweep.json", {"rows": [3]}, "sweep.json: expected a JSON object"),
        ("sweep.json", {"rows": [], "pareto": 3}, "pareto must be a list (each entry a text) or null, not 3"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(tmp_path, capsys, name, content, message):
    path = place(tmp_path, name)
    path.write_text(json.dumps(content))
    output = complaint(capsys, READERS[name][0], path)
    assert message in output and name in output


def test_baselines_windows_need_their_scores(tmp_path, capsys):
    path = tmp_path / "baseline.jsonl"
    path.write_text('{"id": 1, "prediction": "x", "reference": "y", "window": 0}\n' * 2)
    message = "baseline.jsonl, line 1: a window lacks its sequence_score"
    assert message in complaint(capsys, read_baseline, path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("settings", "zeta"), "high"),
        (("settings", "capacity"), 10**30),
        (("settings", "initial"), 10**400),
        (("observed", "value"), None),
        (("observed", "confidences"), ["a"]),
        (("observed", "right"), [1, 0, 1]),
        (("observed", "num_sequences"), 1.5),
        (("observed", "num_sequences"), -7),
        (("observed", "value"), 1e6),
        (("observed", "right"), [9, 0]),
    ],
)
def test_wrong_fields_of_an_adaptive_threshold_are_named(tmp_path, capsys, keys, value):
    path = tmp_path / "adaptive_threshold.json"
    content = json.loads(adapted(tmp_path))
    content[keys[0]][keys[1]] = value
    path.write_text(json.dumps(content))
    output = complaint(capsys, read_adapted, path)
    assert "--adapt_threshold_file" in output and (keys[1] in output or "right" in output)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("max_eval_samples", 10**30, "--max_eval_samples 1000000000000000000000000000000 is too large"),
        (
            "per_device_eval_batch_size",
            2**63,
            "--per_device_eval_batch_size 9223372036854775808 is too large",
        ),
        ("seed", 2**32, "--seed must lie in 0..4294967295, got 4294967296"),
        ("seed", -1, "--seed must lie in 0..4294967295, got -1"),
    ],
)
def test_numbers_that_no_tensor_takes_are_refused_by_flag(
    tmp_path, capsys, monkeypatch, flag, value, message
):
    monkeypatch.chdir(tmp_path)
    settings = {"model_name_or_path": "x", "dataset_name": "debian_de_en", "task": "translation"}
    settings |= {"output_dir": "out", "do_eval": True, flag: value}
    path = Path("arguments.json")
    path.write_text(json.dumps(settings))
    assert message in complaint(capsys, parse_arguments, [str(path)])
