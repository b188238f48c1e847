"""Comparing settings: interleaved decoding, relative figures, the sweep and the choice of an exit."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoding import early_exit_decode
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.free import Free
from models.loading import LoadedModel, load_model
from models.threshold import FixedThreshold
from models.trace import trace_layers
from scripts import choose_exit, sweep
from util.evaluation.comparison import (
    area_under,
    areas_under_curves,
    compare_quality,
    fastest_good,
    name_front,
    restore,
)
from util.evaluation.cost_model import CostModel, Prediction, predict_free, recommend
from util.evaluation.records import Record, Trace

ROOT = Path(__file__).resolve().parent.parent
DATA = ["--dataset_name", "debian_de_en", "--drop_long_samples", "True", "--max_source_length", "28"]
DATA += ["--max_target_length", "28", "--threads", "1"]


def row(name, speedup, bleu, method="FREE", batch_size=1):
    return {
        "name": name,
        "method": method,
        "checkpoint": "free",
        "batch_size": batch_size,
        "speedup": speedup,
        "bleu": bleu,
        "quality_share": 100 * bleu / 20,
    }


ROWS = [
    row("full", 1.0, 20.0, "Full depth"),
    row("careful", 1.25, 19.9),
    row("bold", 2.0, 18.0),
    row("dominated", 1.2, 17.0),
    row("batched", 9.0, 20.0, batch_size=8),
]


def test_area_is_the_mean_quality_over_budgets():
    assert area_under([]) == 0.0
    assert area_under([(0.5, 0.9)]) == pytest.approx(0.45)
    assert area_under([(0.5, 1.0), (0.25, 0.8), (0.75, 0.1), (1.2, 1.0)]) == pytest.approx(0.7)
    assert areas_under_curves(ROWS) == {"FREE (free)": pytest.approx(0.9 * 0.3 + 0.995 * 0.2)}


def test_front_and_fastest_good_setting():
    assert name_front(ROWS, "bleu") == ["bold", "careful", "full"]
    assert fastest_good(ROWS) == {"Full depth": "full", "FREE": "careful"}
    assert fastest_good([row("bad", 3.0, 1.0)]) == {"FREE": None}


def test_quality_share_pairs_its_resamples():
    draws = np.linspace(10, 30, 1000)
    shares = compare_quality(9.0, 10.0, 0.9 * draws, draws)
    assert shares["quality_share"] == 90 and shares["quality_share_interval"] == pytest.approx([90, 90])
    assert compare_quality(1.0, 0.0, draws, 0 * draws) == {
        "quality_share": None,
        "quality_share_interval": None,
    }


def run_script(script, folder, *flags):
    """Run in this process; the script's output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        script.main(["--output_dir", str(folder), *DATA, *flags])
    return output.getvalue()


def refuse(script, folder, *flags):
    """The one line with which the script refuses its flags."""
    message = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(message):
        script.main(["--output_dir", str(folder), *DATA, *flags])
    *_, line = message.getvalue().splitlines()  # progress bars come before it
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


SWEEP = ["--free", "checkpoints/debian-t5-free", "--num_samples", "6", "--methods", "FREE", "FREE adaptive"]
SWEEP += ["--free_thresholds", "0.4", "--adapt_zetas", "0.8", "--batch_sizes", "1", "2"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    run_script(sweep, folder, *SWEEP)
    return folder


def read_records(folder):
    lines = (folder / "records.jsonl").read_text().splitlines()
    return {(record["setting"], record["row"]): record for record in map(json.loads, lines)}


@pytest.mark.slow
def test_sweep_writes_figures_records_and_traces(swept):
    results = json.loads((swept / "sweep.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert set(rows) == {
        f"{name}{size}" for name in ("Full depth", "FREE 0.4", "FREE adaptive 0.8") for size in ("", " x2")
    }
    assert rows["Full depth"]["speedup"] == rows["Full depth x2"]["quality_share"] / 100 == 1
    assert (
        rows["Full depth"]["unchanged"] == 1
        and rows["FREE 0.4 x2"]["unchanged"] == rows["FREE 0.4"]["unchanged"]
    )
    free = rows["FREE 0.4"]
    assert free["real_over_ideal"] == pytest.approx(free["speedup"] / free["ideal_speedup"])
    assert free["speedup_interval"][0] <= free["speedup"] <= free["speedup_interval"][1]
    records = read_records(swept)
    assert len(records) == 6 * 6
    for index in range(6):  # batches change nothing
        for name in ("Full depth", "FREE 0.4"):
            alone, batched = records[name, index], records[name + " x2", index]
            assert alone["prediction"] == batched["prediction"]
    traces = [json.loads(line) for line in (swept / "traces.jsonl").read_text().splitlines()]
    full = [trace for trace in traces if trace["setting"] == "Full depth"]
    assert len(full) == 6 and all(trace["deep"] == trace["pieces"] for trace in full)
    assert all(len(trace["agrees"][0]) == 8 for trace in traces)
    for trace in traces:
        own = records[trace["setting"], trace["row"]]
        assert [trace["pieces"], trace["exit_layers"]] == [own["pieces"], own["exit_layers"]]
    free = {trace["row"]: trace for trace in traces if trace["setting"] == "FREE 0.4"}
    same = [trace for trace in full if trace["pieces"] == free[trace["row"]]["pieces"]]
    assert same, "FREE left some outputs as they were"
    for trace in same:  # which is traced but once
        assert trace["confidences"] == free[trace["row"]]["confidences"]
        assert trace["exit_layers"] != free[trace["row"]]["exit_layers"]


@pytest.mark.slow
def test_interrupted_sweep_goes_on_where_it_stopped(swept, tmp_path):
    lines = (swept / "records.jsonl").read_text().splitlines(keepends=True)
    for name in ("settings.json", "records.settings.json"):
        (tmp_path / name).write_text((swept / name).read_text())
    (tmp_path / "records.jsonl").write_text("".join(lines[:17]) + '{"cut": "o')
    output = run_script(sweep, tmp_path, *SWEEP, "--resume_eval", "True")
    before, after = read_records(swept), read_records(tmp_path)
    assert "6 samples" in output and set(before) == set(after)
    for key, record in before.items():
        kept = key[1] < 2  # one whole block of two samples and six settings was there
        assert (record["seconds"] == after[key]["seconds"]) == kept
        same = ("prediction", "exit_layers", "threshold")
        assert all(record.get(name) == after[key].get(name) for name in same)
    other = [*SWEEP[:3], "5", "--resume_eval", "True"]
    assert "num_samples" in refuse(sweep, tmp_path, *other)


@pytest.mark.parametrize("marks", [{}, {"setting": "Full depth"}, {"setting": "FREE", "row": 0}])
def test_records_of_no_setting_are_not_continued(marks):
    record = Record("1", "text", "text", 1, ["text"], [2], 0.5, **marks)
    log = SimpleNamespace(path=Path("records.jsonl"), records=[record])
    with pytest.raises(UserError, match=r"records\.jsonl: not the records of this comparison"):
        restore([SimpleNamespace(name="Full depth", batch_size=1)], log, range(1))


@pytest.mark.slow
def test_sweep_does_not_trust_impossible_times(swept, tmp_path):
    for name in ("settings.json", "records.settings.json"):
        (tmp_path / name).write_text((swept / name).read_text())
    records = [json.loads(line) for line in (swept / "records.jsonl").read_text().splitlines()]
    for record in records:
        record["seconds"] = 0.05 if record["setting"] == "FREE 0.4" else 1.0
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = " ".join(run_script(sweep, tmp_path, *SWEEP, "--resume_eval", "True").split())
    results = json.loads((tmp_path / "sweep.json").read_text())
    doubts = {row["name"]: row["timing_doubt"] for row in results["rows"] if row["timing_doubt"]}
    assert list(doubts) == ["FREE 0.4"] and doubts["FREE 0.4"].startswith("measured 20.00x")
    assert results["untrusted_timing"] in output and "FREE 0.4 measured 20.00x" in results["untrusted_timing"]


@pytest.mark.slow
def test_a_sweep_does_not_continue_on_changed_data(tmp_path):
    def pair(number, english):
        return json.dumps({"id": str(number), "translation": {"de": "ein paket", "en": english}}) + "\n"

    data = tmp_path / "rows.jsonl"
    data.write_text(pair(0, "a package") + pair(1, "the package"))
    flags = ["--free", "checkpoints/debian-t5-free", "--methods", "Static", "--static_layers", "1"]
    local = ["--test_file", str(data), "--resume_eval", "True"]
    run_script(sweep, tmp_path / "out", *flags, *local)
    before = (tmp_path / "out/records.jsonl").read_bytes()
    data.write_text(pair(0, "a package") + pair(1, "one package"))
    assert "other samples" in refuse(sweep, tmp_path / "out", *flags, *local)
    assert (tmp_path / "out/records.jsonl").read_bytes() == before


def test_output_dir_that_is_a_file_is_refused():
    flags = ["--free", "checkpoints/debian-t5-free", "--num_samples", "1"]
    assert "--output_dir" in refuse(sweep, ROOT / "README.md", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--free or --calm"),
        (["--free", "checkpoints/debian-t5-free", "--methods", "FRE"], "--methods: there is no FRE"),
        (["--calm", "checkpoints/debian-t5-calm", "--calm_methods", "CALMER"], "--calm_methods: there is no"),
        (
            ["--calm", "checkpoints/debian-t5-calm", "--num_samples", "2", "--calm_static_layers", "8"],
            "--calm_static_layers must lie in 1..7",
        ),
        (["--free", "checkpoints/debian-t5-free", "--batch_sizes", "2", "3"], "--batch_sizes must divide"),
        (["--free", "checkpoints/debian-t5-calm", "--num_samples", "2"], "--shallow_layers"),
        (["--free", "checkpoints/debian-t5-free", "--num_samples", "0"], "--num_samples must be positive"),
        (
            ["--free", "checkpoints/debian-t5-free", "--num_samples", "2", "--shallow_layers", "12"],
            "--shallow_layers must lie in 1..7",
        ),
        (
            ["--free", "checkpoints/debian-t5-free", "--lookup_tokens", "4", "--batch_sizes", "2"],
            "--lookup_tokens decodes one sequence at a time",
        ),
        (
            ["--free", "checkpoints/debian-t5-free", "--lookup_tokens", "0"],
            "--lookup_tokens must be positive",
        ),
        (["--free", "checkpoints/debian-t5-free", "--free_thresholds", "1.5"], "free_thresholds must lie"),
    ],
)
def test_sweep_refuses_bad_flags(tmp_path, flags, message):
    assert message in refuse(sweep, tmp_path, *flags)


def make_trace(confidences, agrees):
    """The trace of an output, its pieces apart."""
    pieces = [""] * len(confidences)
    return Trace("FREE", 0, "s0", pieces, None, confidences, agrees, deep=pieces)


LAYERS_ONLY = CostModel(layer=1.0, parallel_token=0.0, head=0.0, confidence=0.0, step=0.0, sample=0.0)


def test_prediction_is_what_free_does_where_its_output_stays_full_depths():
    loaded = load_model(str(ROOT / "checkpoints/debian-t5-free"))
    inputs = loaded.tokenizer("Entwicklungsdateien für die C-Bibliothek", return_tensors="pt")
    full = loaded.model.generate(**inputs, max_length=40)
    stats, policy = DecodeStats(), Free(2, SoftmaxGap(), FixedThreshold(0.9))
    engine = {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
    assert torch.equal(loaded.model.generate(**inputs, max_length=40, **engine), full)
    assert 0 < stats.exit_share < 1
    traced = trace_layers(loaded.model, **inputs, sequences=full)
    trace = make_trace(traced.confidences[0].double().numpy(), traced.agrees[0].numpy())
    prediction = predict_free(LAYERS_ONLY, [trace], 2, 0.9)
    assert prediction.exit_share == pytest.approx(stats.exit_share)
    assert prediction.speedup == pytest.approx(stats.ideal_speedup)
    assert prediction.agreement == prediction.unchanged == 1


def test_prediction_counts_every_part_and_wrong_exits():
    cost = CostModel(layer=1.0, parallel_token=0.5, head=2.0, confidence=3.0, step=5.0, sample=10.0)
    confidences = np.array([[0.9, 1.0], [0.1, 1.0], [0.8, 1.0]])
    agrees = np.array([[True, True], [False, True], [False, True]])
    prediction = predict_free(cost, [make_trace(confidences, agrees)], 1, 0.5)
    full = 10 + 3 * (5 + 2 * 1 + 2)
    free = 10 + 3 * (5 + 1 + 2 + 3) + (1 + 0.5) + 2
    assert prediction.speedup == pytest.approx(full / free)
    assert prediction.agreement == pytest.approx(2 / 3) and prediction.unchanged == 0


class WorkClock:
    """Counts what modules did instead of seconds: a layer 1 and 0.5 for each further token, the head 3."""

    work = 0.0

    def __init__(self, device):
        pass

    def __enter__(self):
        self.start = WorkClock.work
        return self

    def __exit__(self, *error):
        self.seconds = WorkClock.work - self.start

    @staticmethod
    def count(amount):
        WorkClock.work += amount


@pytest.mark.slow
def test_parts_are_measured_apart(monkeypatch):
    model = tiny_model(num_layers=4)
    for block in model.decoder.block:
        block.register_forward_hook(lambda module, given, _: WorkClock.count((given[0].shape[1] + 1) / 2))
    model.lm_head.register_forward_hook(lambda *_: WorkClock.count(3))
    gap = SoftmaxGap.__call__
    monkeypatch.setattr(SoftmaxGap, "__call__", lambda *given: WorkClock.count(2) or gap(*given))
    monkeypatch.setattr("util.evaluation.cost_model.Stopwatch", WorkClock)
    # 10 a sample; 12 a token, of which 4 layers take 4 and the head 3.
    cost = CostModel.measure(LoadedModel(model, None, ExitConfig()), [5, 10, 20], [70.0, 130.0, 250.0])
    parts = {"layer": 1, "parallel_token": 0.5, "head": 3, "confidence": 2, "step": 5, "sample": 10}
    assert vars(cost) == pytest.approx(parts)


def test_recommended_candidate_is_the_fastest_that_agrees():
    slow, fast, wrong = (
        Prediction(2, 0.5, speedup, 0.5, agreement, 0.9)
        for speedup, agreement in ((1.1, 0.999), (1.4, 0.99), (2.0, 0.8))
    )
    assert recommend([slow, fast, wrong], 0.98) is fast
    assert recommend([wrong], 0.98) is None


def test_as_many_candidates_are_measured_as_asked_for():
    candidates = [Prediction(2, 0.5, 1 + number / 10, 0.5, 0.99, 0.9) for number in range(3)]
    for chosen in (None, candidates[1]):
        for count in range(5):
            tested = choose_exit.choose_tested(candidates, chosen, count)
            assert len({*map(id, tested)}) == len(tested) == min(count, 3)
            assert chosen is None or count == 0 or tested[0] is chosen


@pytest.mark.slow
def test_chooser_compares_its_predictions_with_measurements(tmp_path):
    flags = ["--model_name_or_path", "checkpoints/debian-t5-free", "--num_samples", "4", "--measured", "2"]
    flags += ["--shallow_layers", "2", "4", "--thresholds", "0.4", "0.9"]
    output = run_script(choose_exit, tmp_path, *flags)
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert len(choice["predictions"]) == 4 and len(choice["measured"]) == 2
    best = choice["recommended"]
    assert f"--shallow_exit_layer {best['shallow_layer']}" in output
    for one in choice["measured"]:
        assert one["error"] == pytest.approx(100 * (one["speedup"] / one["measured"] - 1))


class EvenClock:
    """Every timed call takes a second, whatever it does."""

    def __init__(self, device, synchronize=True):
        self.seconds = 1.0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.mark.slow
def test_chooser_does_not_trust_what_misses_its_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr("util.evaluation.decode.Stopwatch", EvenClock)
    monkeypatch.setattr(CostModel, "measure", lambda *_: LAYERS_ONLY)
    flags = ["--model_name_or_path", "checkpoints/debian-t5-free", "--num_samples", "4", "--measured", "1"]
    flags += ["--shallow_layers", "2", "--thresholds", "0.4", "--min_agreement", "0"]
    output = " ".join(run_script(choose_exit, tmp_path, *flags).split())
    choice = json.loads((tmp_path / "choice.json").read_text())
    (one,) = choice["measured"]
    assert one["measured"] == 1 and one["speedup"] > 1.25  # by layers alone
    assert one["timing_doubt"] == f"predicted {one['speedup']:.2f}x, measured 1.00x"
    # A layer is a second to the cost model: 8 a token, where the clock counts one a sample.
    assert "full depth by the cost model predicted" in choice["untrusted_timing"]
    assert choice["untrusted_timing"].startswith("This timing cannot be trusted: layer 2, threshold 0.4 pred")
    assert choice["untrusted_timing"] in output
