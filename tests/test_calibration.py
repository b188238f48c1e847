"""Calibrated thresholds: the file from calibration to evaluation, and what it promises."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from p_values import p_value_by_hand
from scipy.stats import binom
from tiny_models import tiny_model
from transformers import T5Tokenizer

import run
from models.errors import UserError
from models.exit_heads import ExitConfig
from scripts import calibrate, simulate_calibration
from util.calibration.certificate import CalibratedThreshold
from util.calibration.consistency import CONSISTENCIES

ROOT = Path(__file__).resolve().parent.parent


WORDS = [f"{letter}{vowel}{end}" for letter in "bdfglmnprst" for vowel in "aeiou" for end in "nk"][:93]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Flags for a tiny model, trained (so it says) to exit after layer 2, and twelve rows a split."""
    folder = tmp_path_factory.mktemp("inputs")
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    T5Tokenizer(vocab=vocabulary + [(f"▁{word}", -3.0) for word in WORDS], extra_ids=0).save_pretrained(
        folder
    )
    tiny_model().save_pretrained(folder)
    ExitConfig("shallowdeep_ce", 2).save(folder)
    for name, shift in (("validation", 0), ("test", 40)):
        texts = [" ".join(WORDS[(3 * row + shift) % 80 :][:6]) for row in range(13)]
        pairs = [{"de": source, "en": target} for source, target in pairwise(texts)]
        rows = [json.dumps({"id": str(row), "translation": pair}) for row, pair in enumerate(pairs)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "model_name_or_path": folder,
        "validation_file": folder / "validation.jsonl",
        "test_file": folder / "test.jsonl",
        "source_lang": "de",
        "target_lang": "en",
        "max_target_length": 10,
        "per_device_eval_batch_size": 1,
        "use_cpu": True,
        "backend": "torch",
        "report_to": "none",
        "disable_tqdm": True,
        "use_shallow_deep": True,
    }


def as_argv(flags):
    words = [[f"--{name}", *(value if isinstance(value, list) else [value])] for name, value in flags.items()]
    return [str(word) for group in words for word in group]


def read(path):
    return json.loads(Path(path).read_text())


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def error_of(main, flags, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(as_argv(flags))
    assert stop.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return error


GRID = {"thresholds": [0.0, 1.0, 0.3, 0.01], "delta": 0.5, "epsilon": 0.1}


@pytest.fixture(scope="module")
def calibrated(inputs, tmp_path_factory):
    """Output folder of a calibration of FREE on the validation rows."""
    folder = tmp_path_factory.mktemp("calibrated")
    calibrate.main(as_argv(inputs | GRID | {"output_dir": folder}))
    return folder


@pytest.mark.slow
def test_calibration_records_what_it_did(calibrated):
    result = read(calibrated / "calibrated_threshold.json")
    rows = result["candidates"]
    assert [row["threshold"] for row in rows] == [1.0, 0.3, 0.01, 0.0]
    assert rows[0]["risk"] == 0 and rows[0]["ideal_speedup"] == 1 and rows[0]["layers_per_token"] == 6
    assert rows[0]["p_value"] == pytest.approx(0.5**12) and rows[0]["certified"]
    assert rows[-1]["exit_share"] > rows[0]["exit_share"] == 0
    with np.load(calibrated / "losses.npz") as arrays:
        losses = arrays["textual"]
    assert losses.shape == (12, 4) and (losses[:, 0] == 0).all() and losses.max() > 0
    for row, column in zip(rows, losses.T, strict=True):
        assert row["risk"] == pytest.approx(sum(column.tolist()) / 12)
        if row["risk"] < 0.5:  # delta
            assert row["p_value"] == pytest.approx(p_value_by_hand(row["risk"], 12, 0.5))
    certified = [row["p_value"] <= 0.1 for row in rows]  # epsilon
    passed = certified.index(False) if False in certified else 4
    assert [row["certified"] for row in rows] == [True] * passed + [False] * (4 - passed)
    assert result["threshold"] == rows[passed - 1]["threshold"]  # the lower, the faster
    assert result["samples"] == 12 and result["settings"]["shallow_exit_layer"] == 2


@pytest.mark.slow
def test_evaluation_uses_the_certified_threshold(inputs, calibrated, tmp_path, caplog):
    file = calibrated / "calibrated_threshold.json"
    threshold = read(file)["threshold"]
    flags = inputs | {"output_dir": tmp_path, "calibrated_threshold_file": file}
    run.main(as_argv(flags | {"do_predict": True}))
    assert read(tmp_path / "predict_results.json")["arguments"]["shallow2deep_conf_threshold"] == threshold
    assert "promises nothing" not in caplog.text
    run.main(as_argv(flags | {"do_eval": True}))  # what was calibrated on
    assert "promises nothing" in caplog.text
    ours = read_lines(tmp_path / "predictions.jsonl")
    theirs = [
        record
        for record in read_lines(calibrated / "records.jsonl")
        if record["setting"] == f"threshold {threshold}"
    ]
    assert [record["prediction"] for record in ours] == [record["prediction"] for record in theirs]


def test_candidates_take_turns(calibrated):
    records = read_lines(calibrated / "records.jsonl")
    names = ["Full depth", *(f"threshold {value}" for value in sorted(GRID["thresholds"], reverse=True))]
    expected = [(row, name) for row in range(12) for name in names]
    assert [(record["row"], record["setting"]) for record in records] == expected


class SlowingClock:
    """Every timed call takes as much work as any other, on a machine that gets slower and slower."""

    calls = 0

    def __init__(self, device, synchronize=True):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        SlowingClock.calls += 1
        self.seconds = 1.0 + SlowingClock.calls / 10


@pytest.mark.slow
def test_a_machine_that_slows_down_favours_no_candidate(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("util.evaluation.decode.Stopwatch", SlowingClock)
    calibrate.main(as_argv(inputs | GRID | {"output_dir": tmp_path}))
    rows = read(tmp_path / "calibrated_threshold.json")["candidates"]
    # 5 settings of 12 samples, 0.1 s more each time: one after the other, the last would be at 0.4.
    assert [row["speedup"] for row in rows] == pytest.approx([1.0] * 4, abs=0.03)


def test_impossible_timing_is_told(inputs, calibrated, tmp_path, capsys):
    for name in ("records.jsonl", "records.settings.json"):
        (tmp_path / name).write_bytes((calibrated / name).read_bytes())
    records = read_lines(calibrated / "records.jsonl")
    for record in records:  # a busy minute for all but the boldest
        record["seconds"] = 0.1 if record["setting"] == "threshold 0.0" else 1.0 + record["row"] / 100
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    calibrate.main(as_argv(inputs | GRID | {"output_dir": tmp_path, "resume_eval": True}))
    output = " ".join(capsys.readouterr().out.split())
    assert "timing cannot be trusted: threshold 0.0 measured 10.55x, the work saved allows" in output
    doubts = [row["timing_doubt"] for row in read(tmp_path / "calibrated_threshold.json")["candidates"]]
    assert doubts[:3] == [None] * 3 and doubts[3].startswith("measured 10.55x")


OTHER_USES = {
    "another layer": ({"shallow_exit_layer": 3}, "shallow_exit_layer 2, not 3"),
    "another method": ({"use_shallow_deep": False, "use_early_exit": True}, "method '--use_shallow_deep'"),
    "state copying": ({"copy_skipped_hidden_states": True}, "copy_skipped_hidden_states False, not True"),
    "another length": ({"val_max_target_length": 12}, "max_length 10, not 12"),
    "another source length": ({"max_source_length": 64}, "max_source_length 512, not 64"),
    "another threshold": ({"shallow2deep_conf_threshold": 0.123}, "--shallow2deep_conf_threshold 0.123"),
    "another precision": ({"bf16_full_eval": True}, "precision"),
    "adaptive": ({"use_adapt_threshold": True}, "--use_adapt_threshold"),
    "lossless": ({"lossless": True}, "--lossless"),
    "training": ({"do_train": True}, "--do_train"),
    "no method": ({"use_shallow_deep": False}, "no effect"),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_other_uses_are_refused_in_one_line(inputs, calibrated, tmp_path, capsys, name):
    changes, expected = OTHER_USES[name]
    flags = inputs | {"output_dir": tmp_path, "do_predict": True}
    flags |= {"calibrated_threshold_file": calibrated / "calibrated_threshold.json"} | changes
    error = error_of(run.main, flags, capsys)
    assert expected in error and "--calibrated_threshold_file" in error


OTHER_MODELS = {  # with the same weights: file, words in it and those in their place, what is named
    "penalty": (
        "generation_config.json",
        "{",
        '{"repetition_penalty": 5.0, "min_length": 9,',
        "configuration",
    ),
    "pieces": ("tokenizer.json", f"▁{WORDS[0]}", "▁other", "tokenizer"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_certificate_is_for_one_configuration_and_tokenizer(inputs, calibrated, tmp_path, capsys, name):
    file, *words, expected = OTHER_MODELS[name]
    shutil.copytree(inputs["model_name_or_path"], tmp_path / "model")
    file = tmp_path / "model" / file
    file.write_text(file.read_text().replace(*words, 1))
    flags = inputs | {"model_name_or_path": file.parent, "output_dir": tmp_path, "do_predict": True}
    flags |= {"calibrated_threshold_file": calibrated / "calibrated_threshold.json"}
    assert f"calibrated with other {expected}: calibrate again" in error_of(run.main, flags, capsys)


OTHER_FILES = {
    "other weights": ({"weights": "torch.float32:0"}, "other weights or precision: calibrate again"),
    "another configuration": ({"configuration": "0", "tokenizer": "0"}, "other configuration, tokenizer"),
    "another backend": ({"backend": "onnx"}, "backend 'onnx', not 'torch'"),
    "another device": ({"device": "cuda"}, "device 'cuda', not 'cpu'"),
    "another task": ({"task": "summarization"}, "task 'summarization', not 'translation'"),
    "another measure": ({"shallow2deep_conf_type": "meta"}, "shallow2deep_conf_type 'meta', not 'softmax'"),
    "nothing certified": ({"threshold": None}, "no threshold was certified"),
    "another program's": ({"candidates": "MISSING"}, "not what scripts/calibrate.py writes"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused_in_one_line(calibrated, tmp_path, name):
    changes, expected = OTHER_FILES[name]
    content = read(calibrated / "calibrated_threshold.json")
    model, settings = dict(content["model"]), dict(content["settings"])
    for key, value in changes.items():
        parts = (content["settings"], content["model"], content)
        next(part for part in parts if key in part)[key] = value
    file = tmp_path / "file.json"
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "MISSING"}))
    with pytest.raises(UserError) as error:
        CalibratedThreshold.load(file).certified(file, model, settings)
    assert expected in str(error.value) and f"--calibrated_threshold_file {file}" in str(error.value)


@pytest.mark.slow
def test_too_few_samples_are_told(inputs, tmp_path, capsys):
    flags = inputs | {"thresholds": [1.0, 0.5], "delta": 0.1, "output_dir": tmp_path}
    calibrate.main(as_argv(flags))
    assert "would need 29 samples, there are 12" in " ".join(capsys.readouterr().out.split())
    result = read(tmp_path / "calibrated_threshold.json")
    assert result["threshold"] is None and result["needed_samples"] == 29


@pytest.mark.slow
def test_hopeless_loss_is_told(inputs, tmp_path, capsys):
    flags = inputs | {"thresholds": [0.0], "delta": 0.01, "output_dir": tmp_path}
    calibrate.main(as_argv(flags))
    assert "no number of samples would do" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_interrupted_calibration_continues(inputs, calibrated, tmp_path):
    for file in calibrated.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    log = tmp_path / "records.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    flags = inputs | GRID | {"output_dir": tmp_path, "resume_eval": True, "method": "ucb"}
    calibrate.main(as_argv(flags))
    before, after = (read(folder / "calibrated_threshold.json") for folder in (calibrated, tmp_path))
    assert after["threshold"] == before["threshold"] and after["method"] == "ucb"
    for ours, theirs in zip(after["candidates"], before["candidates"], strict=True):
        assert (ours["risk"], ours["certified"]) == (theirs["risk"], theirs["certified"])
        assert ours["layers_per_token"] == theirs["layers_per_token"] and "bound" in ours
    assert log.read_bytes().startswith(whole[: len(whole) // 4])


def test_a_calibration_does_not_continue_on_changed_data(inputs, calibrated, tmp_path, capsys):
    for file in calibrated.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = tmp_path / "rows.jsonl"
    first, *others = inputs["validation_file"].read_text().splitlines(keepends=True)
    rows.write_text("".join([*others, first]))  # the same rows in another order
    flags = inputs | GRID | {"output_dir": tmp_path, "resume_eval": True, "validation_file": rows}
    assert "records.jsonl was begun with other samples" in error_of(calibrate.main, flags, capsys)


BAD_FLAGS = {
    "delta": ({"delta": 0}, "--delta"),
    "epsilon": ({"epsilon": 1.5}, "--epsilon"),
    "threshold": ({"thresholds": [0.5, 1.5]}, "--thresholds"),
    "method": ({"method": "bonferroni"}, "--method"),
    "nothing to calibrate": ({"use_shallow_deep": False}, "--use_shallow_deep"),
    "static exit": ({"use_shallow_deep": False, "static_exit_layer": 2}, "Nothing to calibrate"),
    "fixed threshold": ({"shallow2deep_conf_threshold": 0.5}, "--shallow2deep_conf_threshold"),
    "adaptive threshold": ({"use_adapt_threshold": True}, "--use_adapt_threshold"),
    "lossless": ({"lossless": True}, "--lossless"),
    "training": ({"do_train": True}, "--do_train"),
    "prediction": ({"do_predict": True}, "--split"),
    "unknown flag": ({"detla": 0.1}, "detla"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_of_calibration_get_one_line(inputs, tmp_path, capsys, name):
    changes, expected = BAD_FLAGS[name]
    assert expected in error_of(calibrate.main, inputs | {"output_dir": tmp_path} | changes, capsys)


def test_bad_flags_of_simulation_get_one_line(calibrated, tmp_path, capsys):
    flags = {"losses_file": calibrated / "losses.npz", "output_dir": tmp_path}
    text = tmp_path / "text.npz"
    text.write_text("losses")
    bad = {
        "--losses_file": {"losses_file": text},
        "--deltas": {"deltas": [0.1, 2]},
        "--methods": {"methods": ["ltt", "none"]},
        "--resamples": {"resamples": 0},
        "unknown": {"unknown": 1},
    }
    for expected, changes in bad.items():
        assert expected in error_of(simulate_calibration.main, flags | changes, capsys)
    assert "--output_dir" in error_of(simulate_calibration.main, {"losses_file": text}, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_simulation_of_decoded_losses(calibrated, tmp_path, consistency):
    flags = {"losses_file": calibrated / "losses.npz", "output_dir": tmp_path, "consistency": consistency}
    simulate_calibration.main(as_argv(flags | {"deltas": [0.3, 0.6], "size": 60, "resamples": 50}))
    rows = read(tmp_path / "simulation.json")["rows"]
    assert len(rows) == 2 * 5 and len({row["method"] for row in rows}) == 5
    for row in rows:
        if row["method"] == "crc":
            assert row["mean_risk"] <= row["delta"]
        else:
            assert row["violation_rate"] <= binom.ppf(0.999, 50, 0.05) / 50
    assert (tmp_path / "simulation.png").stat().st_size > 0 and (tmp_path / "simulation.csv").is_file()


@pytest.mark.slow
def test_calm_by_conformal_risk_control(inputs, tmp_path):
    flags = {name: value for name, value in inputs.items() if name != "use_shallow_deep"}
    flags |= {"use_early_exit": True, "exit_min_layer": 2, "output_dir": tmp_path / "calibration"}
    grid = {"thresholds": [1.0, 0.3, 0.05], "delta": 0.4, "method": "crc", "consistency": "risk"}
    calibrate.main(as_argv(flags | grid | {"fastest_by": "seconds"}))
    file = tmp_path / "calibration" / "calibrated_threshold.json"
    result = read(file)
    certified = [row for row in result["candidates"] if row["certified"]]
    assert result["threshold"] == max(certified, key=lambda row: row["speedup"])["threshold"]
    assert certified[0]["bound"] == pytest.approx(1 / 13)
    assert result["p_value"] is None and result["epsilon"] is None
    use = flags | {"do_predict": True, "calibrated_threshold_file": file, "output_dir": tmp_path / "use"}
    run.main(as_argv(use))
    arguments = read(tmp_path / "use" / "predict_results.json")["arguments"]
    assert arguments["exit_conf_threshold"] == result["threshold"] and arguments["exit_min_layer"] == 2


@pytest.mark.slow
def test_embedded_checkpoint(tmp_path):
    flags = {
        "model_name_or_path": ROOT / "checkpoints" / "debian-t5-free",
        "dataset_name": "debian_de_en",
        "max_target_length": 24,
        "use_cpu": True,
        "use_shallow_deep": True,
        "max_eval_samples": 6,
        "per_device_eval_batch_size": 1,
        "output_dir": tmp_path,
    }
    calibrate.main(as_argv(flags | {"thresholds": [1.0, 0.3], "delta": 0.5}))
    result = read(tmp_path / "calibrated_threshold.json")
    first, last = result["candidates"]
    assert first["risk"] == 0 == first["exit_share"] and first["certified"]  # 0.5^6 <= 0.05
    assert last["exit_share"] > 0.3 and last["ideal_speedup"] > 1.2
