"""Rows shared out over processes of torchrun and over jobs of an array: the results of one process."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from datasets import Dataset
from programs import run_in_two_processes
from real_rows import ROOT

from models.errors import UserError
from scripts import calibrate, sweep
from util.evaluation.records import EvaluationSettings, Record
from util.evaluation.shards import Shards, share_out
from util.files import locked_output_dir

DATA = ["--dataset_name", "debian_de_en", "--max_target_length", "12", "--val_max_target_length", "12"]
DATA += ["--backend", "torch"]
SWEEP = ["--free", "checkpoints/debian-t5-free", "--num_samples", "5", "--batch_sizes", "1", "2", *DATA]
SWEEP += ["--methods", "FREE", "CALM", "--free_thresholds", "0.4", "--calm_thresholds", "0.5"]
SWEEP += ["--trace_samples", "2"]
SETTINGS = 2 * 3
CALIBRATION = ["--model_name_or_path", "checkpoints/debian-t5-free", "--use_shallow_deep", "True", *DATA]
CALIBRATION += ["--max_eval_samples", "5", "--per_device_eval_batch_size", "2", "--use_cpu", "True"]
CALIBRATION += ["--thresholds", "1.0", "0.3", "0.1", "--delta", "0.5", "--epsilon", "0.5"]
TIMED = {
    "seconds", "seconds_per_sample_median", "tokens_per_second", "ms_per_token", "speedup", "real_over_ideal",
    "speedup_interval", "speedup_median", "timing_doubt",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def by_one_process(script, flags, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        shard(script, folder, flags)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return by_one_process(sweep, SWEEP, tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return by_one_process(calibrate, CALIBRATION, tmp_path_factory.mktemp("calibration"))


def shard(script, folder, flags, *more):
    script.main([*flags, "--output_dir", str(folder), *map(str, more)])


def refusal(script, folder, flags, *more, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        shard(script, folder, flags, *more)
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    """The records of a file in their order, but for what was timed."""
    rows = map(json.loads, path.read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def assert_same_sweep(ours, theirs):
    records = lines_of(ours / "records.jsonl")
    assert records == lines_of(theirs / "records.jsonl") and len(records) == 5 * SETTINGS
    assert (ours / "traces.jsonl").read_text() == (theirs / "traces.jsonl").read_text()
    for one, other in zip(*(read(folder / "sweep.json")["rows"] for folder in (ours, theirs)), strict=True):
        assert {name for name in one if one[name] != other[name]} <= TIMED and one.keys() == other.keys()
    first, second = (read(folder / "settings.json") for folder in (ours, theirs))
    for settings in (first, second):
        del settings["arguments"]["output_dir"]
    assert first == second
    assert (ours / "report.html").is_file()


def assert_same_calibration(ours, theirs):
    records = lines_of(ours / "records.jsonl")
    assert records == lines_of(theirs / "records.jsonl") and len(records) == 5 * 4
    first, second = (read(folder / "calibrated_threshold.json") for folder in (ours, theirs))
    for certificate in (first, second):
        del certificate["environment"]
        certificate["candidates"] = [
            {name: value for name, value in row.items() if name not in TIMED}
            for row in certificate["candidates"]
        ]
    assert first == second and first["samples"] == 5


@pytest.mark.slow
def test_two_processes_sweep_as_one(swept, tmp_path):
    run_in_two_processes("scripts/sweep.py", *SWEEP, "--output_dir", tmp_path)
    assert_same_sweep(tmp_path, swept)


@pytest.mark.slow
def test_two_processes_calibrate_as_one(calibrated, tmp_path):
    run_in_two_processes("scripts/calibrate.py", *CALIBRATION, "--output_dir", tmp_path)
    assert_same_calibration(tmp_path, calibrated)


@pytest.mark.slow
def test_jobs_of_an_array_sweep_as_one(swept, tmp_path, capsys):
    """Five rows in blocks of two are three shares, and one is left without. One job was killed."""
    for index in (0, 1):
        shard(sweep, tmp_path, SWEEP, "--num_shards", 4, "--shard_index", index)
    assert not (tmp_path / "sweep.json").exists()
    log = tmp_path / "records.part0.jsonl"
    before = log.read_text().splitlines(keepends=True)
    assert len(before) == 2 * SETTINGS
    log.write_text("".join(before[:7]) + before[7][:30])
    merge = ("--num_shards", 4, "--merge_shards", True)
    line = refusal(sweep, tmp_path, SWEEP, *merge, capsys=capsys)
    assert "missing or unfinished: 0 (7 of 12 outputs), 2 (0 of 6 outputs)." in line
    for index in (0, 2):
        shard(sweep, tmp_path, SWEEP, "--num_shards", 4, "--shard_index", index, "--resume_eval", True)
    shard(sweep, tmp_path, SWEEP, *merge)
    assert_same_sweep(tmp_path, swept)


@pytest.mark.slow
def test_a_killed_job_keeps_what_it_decoded(tmp_path):
    """Three rows one by one, of which the first was whole when the job was killed."""
    flags = ["--free", "checkpoints/debian-t5-free", "--num_samples", "6", "--methods", "FREE", *DATA]
    flags += ["--free_thresholds", "0.4", "--num_shards", "2", "--shard_index", "1"]
    shard(sweep, tmp_path, flags)
    log = tmp_path / "records.part1.jsonl"
    before = log.read_text().splitlines(keepends=True)
    assert [json.loads(line)["row"] for line in before] == [3, 3, 4, 4, 5, 5]
    log.write_text("".join(before[:3]) + before[3][:30])
    shard(sweep, tmp_path, flags, "--resume_eval", True)
    after = log.read_text().splitlines(keepends=True)
    assert after[:2] == before[:2] and after[2:] != before[2:]  # timed anew
    assert [json.loads(line)["pieces"] for line in after] == [json.loads(line)["pieces"] for line in before]


@pytest.mark.slow
def test_jobs_of_an_array_calibrate_as_one(calibrated, tmp_path, capsys):
    shard(calibrate, tmp_path, CALIBRATION, "--num_shards", 2, "--shard_index", 1)
    merge = ("--num_shards", 2, "--merge_shards", True)
    line = refusal(calibrate, tmp_path, CALIBRATION, *merge, capsys=capsys)
    assert "missing or unfinished: 0 (0 of 16 outputs)." in line
    shard(calibrate, tmp_path, CALIBRATION, "--num_shards", 2, "--shard_index", 0)
    shard(calibrate, tmp_path, CALIBRATION, *merge)
    assert_same_calibration(tmp_path, calibrated)


@pytest.mark.slow
def test_shares_of_other_settings_are_refused(tmp_path, capsys):
    few = [*SWEEP, "--num_shards", "3"]
    for index in range(3):
        threshold = ["--calm_thresholds", "0.6"] if index == 1 else []
        shard(sweep, tmp_path, few, "--shard_index", index, *threshold)
    line = refusal(sweep, tmp_path, few, "--merge_shards", True, capsys=capsys)
    assert "records.part1.jsonl was decoded with other calm_thresholds:" in line
    line = refusal(sweep, tmp_path, SWEEP, "--num_shards", 2, "--merge_shards", True, capsys=capsys)
    assert "records.part0.jsonl was decoded with other processes:" in line
    line = refusal(sweep, tmp_path, [*few, "--resume_eval", "True"], "--shard_index", 1, capsys=capsys)
    assert "records.part1.jsonl was begun with other calm_thresholds;" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_shards", "2"], "--num_shards 2 needs --shard_index"),
        (["--num_shards", "0"], "--num_shards must be positive"),
        (["--num_shards", "2", "--shard_index", "2"], "--shard_index must lie in 0..1"),
        (["--num_shards", "2", "--shard_index", "0", "--merge_shards", "True"], "contradict"),
        (
            ["--num_shards", "2", "--shard_index", "0", "--methods", "FREE", "FREE adaptive"],
            "--methods: FREE adaptive learns from sample to sample",
        ),
    ],
)
def test_flags_that_share_nothing_are_refused(tmp_path, capsys, flags, message):
    short = ["--free", "checkpoints/debian-t5-free", *DATA]
    assert message in refusal(sweep, tmp_path, short, *flags, capsys=capsys)


def test_torchrun_does_not_start_jobs_of_an_array(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ("--num_shards", 2, "--shard_index", 0)
    assert "leave the flags out, or torchrun" in refusal(sweep, tmp_path, SWEEP, *flags, capsys=capsys)


@pytest.mark.parametrize(("total", "block", "count"), [(7, 2, 2), (8, 8, 2), (5, 2, 4), (0, 3, 2), (9, 1, 4)])
def test_shares_are_whole_blocks_and_all_rows_in_order(total, block, count):
    rows = Dataset.from_dict({"number": list(range(total))})
    shares = [Shards(count, index).own_rows(total, block) for index in range(count)]
    decoded = [number for share in shares for number in rows.select(share)["number"]]  # none is left to some
    assert decoded == list(range(total)) and all(share.start % block == 0 for share in shares)


def test_what_one_process_decoded_is_not_thrown_away_by_two_that_resume(tmp_path):
    def decode(rows, log):
        log.append([Record(str(row), "a", "b", 1, ["a"], [2], 1.0) for row in rows])
        return log.records

    path, results = tmp_path / "predictions.jsonl", tmp_path / "eval_results.json"
    settings = EvaluationSettings("translation", 8, 8, path, outcomes=(results,))
    share_out(decode, 4, settings, {"seed": 1}, Shards())
    results.write_text("{}")
    before = path.read_bytes()
    for shards in (Shards(2, 0), Shards(2, 1)):
        with pytest.raises(UserError, match=r"^--resume_eval: .* was begun with other processes"):
            share_out(decode, 4, replace(settings, resume=True), {"seed": 1}, shards)
    assert path.read_bytes() == before and results.is_file()


def test_two_jobs_do_not_decode_the_same_share(tmp_path):
    with locked_output_dir(tmp_path, 1):
        with locked_output_dir(tmp_path, 0):  # other shares, and whoever merges, are not in the way
            pass
        with locked_output_dir(tmp_path):
            pass
        with (
            pytest.raises(UserError, match="another run is decoding shard 1;"),
            locked_output_dir(tmp_path, 1),
        ):
            pass
