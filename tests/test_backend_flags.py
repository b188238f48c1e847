"""--backend and --precision: what runs an evaluation, what is recorded of it, what contradicts it."""

from __future__ import annotations

import json
import shutil

import pytest

import run
from models.choices import PRECISIONS

EVALUATION = {
    "model_name_or_path": "checkpoints/debian-t5-free",
    "dataset_name": "debian_de_en",
    "do_eval": True,
    "max_eval_samples": 3,
    "per_device_eval_batch_size": 1,
    "val_max_target_length": 12,
    "use_cpu": True,
    "report_to": "none",
}
FREE = {"use_shallow_deep": True, "shallow2deep_conf_threshold": 0.3}
BEAMS = {"num_beams": 2}


def evaluate(folder, **flags):
    given = EVALUATION | ({} if BEAMS.items() <= flags.items() else FREE) | flags | {"output_dir": folder}
    run.main([str(word) for name, value in given.items() for word in (f"--{name}", value)])
    return json.loads((folder / "eval_results.json").read_text())["environment"]


def outputs(folder):
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [(row["prediction"], row["exit_layers"]) for row in rows]


@pytest.fixture(scope="module")
def by_default(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    return folder, evaluate(folder)


@pytest.mark.slow
def test_onnx_is_the_default_on_a_cpu_and_decodes_what_torch_does(by_default, tmp_path):
    folder, environment = by_default
    assert (environment["backend"], environment["precision"]) == ("onnx", "fp32")
    environment = evaluate(tmp_path, backend="torch")
    assert (environment["backend"], environment["precision"]) == ("torch", "fp32")
    assert outputs(tmp_path) == outputs(folder)


@pytest.mark.slow
def test_a_precision_asks_for_onnx_and_is_recorded(tmp_path):
    environment = evaluate(tmp_path, precision="w8", lossless=True)
    assert (environment["backend"], environment["precision"]) == ("onnx", "w8")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [BEAMS, {"parallel_causal_mask": False}])
def test_what_only_torch_can_do_runs_there(tmp_path, flags):
    assert evaluate(tmp_path, **flags)["backend"] == "torch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"backend": "onnx", **BEAMS}, "--num_beams needs --backend torch"),
        ({"precision": "w8", "parallel_causal_mask": False}, "--parallel_causal_mask False needs"),
        ({"precision": "w4", "lossless": True}, "--lossless needs --precision fp32, w8, int8"),
        ({"backend": "torch", "precision": "w8"}, "--precision w8 is for exported graphs"),
        ({"precision": "w8", "bf16_full_eval": True}, "bfloat16"),
        ({"backend": "compile", "precision": "w8"}, "precision w8 needs backend onnx"),
        ({"threads": 0}, "--threads must be positive"),
        ({"precision": "w7"}, "w7"),
    ],
)
def test_contradictions_get_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        evaluate(tmp_path, **flags)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.slow
def test_an_evaluation_is_continued_by_the_same_backend_only(by_default, tmp_path, capsys):
    folder, _ = by_default
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    evaluate(tmp_path, resume_eval=True)
    for other in ({"backend": "torch"}, {"precision": PRECISIONS[1]}):
        with pytest.raises(SystemExit):
            evaluate(tmp_path, resume_eval=True, **other)
        assert "resume_eval" in capsys.readouterr().err
