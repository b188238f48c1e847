"""Evaluation of questions whose contexts are read in windows, and the comparison with full depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from real_rows import ROOT

import run
from models.loading import load_model
from util.evaluation.comparison import share_equal
from util.evaluation.metrics import SampleMean
from util.evaluation.records import EvaluationSettings, Record, best_windows
from util.evaluation.significance import resamples
from util.evaluation.summary import measure_samples, summarize

CHECKPOINT = str(ROOT / "checkpoints/debian-t5-free")
FLAGS = {
    "model_name_or_path": CHECKPOINT,
    "task": "question_answering",
    "data_dir": str(ROOT / "data/questions"),
    "do_eval": True,
    "max_source_length": 48,
    "doc_stride": 8,
    "max_target_length": 6,
    "use_cpu": True,
    "report_to": "none",
    "per_device_eval_batch_size": 4,
}


def evaluate(output_dir, **flags):
    settings = FLAGS | {"output_dir": output_dir} | flags
    run.main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    return json.loads((output_dir / "eval_results.json").read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_most_probable_window_answers(tmp_path):
    results = evaluate(tmp_path / "full")
    records = read_lines(tmp_path / "full/predictions.jsonl")
    best = [record.as_row() for record in best_windows([Record.from_row(row, "") for row in records])]
    scored = read_lines(tmp_path / "full/predictions.scores.jsonl")
    assert (
        results["samples"] == len(best) == len(scored) == len({row["id"] for row in records}) < len(records)
    )
    assert results["f1"] == pytest.approx(sum(row["f1"] for row in scored) / len(scored))
    for row in best:
        rivals = [other["sequence_score"] for other in records if other["id"] == row["id"]]
        assert row["sequence_score"] == max(rivals)


def test_a_question_takes_as_long_as_its_windows():
    windows = [("a", 0, 1.0, 2), ("a", 1, 2.0, 4), ("b", 0, 5.0, 3), ("c", 0, 4.0, 3)]
    records = [
        Record(name, "x", "x", tokens, [], None, seconds, window=window, sequence_score=-1.0)
        for name, window, seconds, tokens in windows
    ]
    settings = EvaluationSettings("question_answering", 8, 8, Path("x"))
    results = summarize(records, measure_samples(best_windows(records), settings.task, None), settings, 4)
    assert results["seconds_per_sample_median"] == 4.0 and results["tokens_per_sample"] == 4.0
    assert results["samples"] == 3 and results["ms_per_token"] == pytest.approx(1000)


def test_a_long_sample_is_unchanged_once():
    def record(name, window, piece, score):
        more = {"window": window, "sequence_score": score}
        return Record(name, piece, "x", 1, [piece], None, 1.0, **more)

    full = [record("a", window, "x", -1.0 - window) for window in range(9)] + [record("b", 0, "x", -1.0)]
    other = [*full[:9], record("b", 0, "y", -1.0)]
    assert share_equal(full, full) == 1 and share_equal(other, full) == 0.5
    unchosen = [full[0], record("a", 1, "y", -2.0), *full[2:]]  # an answer that none gets to see
    assert share_equal(unchosen, full) == 1


@pytest.mark.slow
def test_sequence_scores_are_mean_log_probabilities(tmp_path):
    evaluate(tmp_path, max_eval_samples=2, max_source_length=512)
    loaded = load_model(CHECKPOINT)
    rows = read_lines(ROOT / "data/questions/validation.jsonl")
    for row, record in zip(rows, read_lines(tmp_path / "predictions.jsonl"), strict=False):
        source = f"question: {row['question']} context: {row['context']}"
        labels = torch.tensor([loaded.tokenizer.convert_tokens_to_ids(record["pieces"])])
        with torch.no_grad():
            loss = loaded.model(**loaded.tokenizer(source, return_tensors="pt"), labels=labels).loss
        assert record["sequence_score"] == pytest.approx(-loss.item(), rel=1e-3)


@pytest.mark.slow
def test_full_depth_is_the_baseline_of_an_early_exit(tmp_path):
    evaluate(tmp_path / "full")
    baseline = {"baseline_predictions": tmp_path / "full/predictions.jsonl"}
    same = evaluate(tmp_path / "same", **baseline)["vs_baseline"]
    assert same["f1"]["difference"] == 0 and same["f1"]["p_value"] == 1
    early = evaluate(tmp_path / "early", static_exit_layer=1, **baseline)
    full = json.loads((tmp_path / "full/eval_results.json").read_text())
    assert early["vs_baseline"]["f1"]["difference"] == pytest.approx(early["f1"] - full["f1"])
    assert set(early["confidence_intervals"]) == {"exact_match", "f1"}


@pytest.mark.slow
def test_a_text_is_compared_with_its_references_once(tmp_path, monkeypatch):
    """Scores, each sample's own, intervals and the test against a baseline share the counts, and the last two
    the draws."""
    evaluate(tmp_path / "full")
    counted, drawn, statistics = [], [], SampleMean.statistics

    def count(metric, predictions, references):
        counted.append(len(predictions))
        return statistics(metric, predictions, references)

    def draw(size, seed):
        drawn.append(size)
        return resamples(size, seed)

    monkeypatch.setattr(SampleMean, "statistics", count)
    monkeypatch.setattr("util.evaluation.significance.resamples", draw)
    results = evaluate(tmp_path / "same", baseline_predictions=tmp_path / "full/predictions.jsonl")
    assert counted == drawn == [results["samples"]] * 2  # the baseline's as well


@pytest.mark.slow
def test_a_baseline_of_other_rows_is_refused_before_decoding(tmp_path, capsys):
    """Rows of a table are numbered, so that those of every split have the same ids."""
    for split in ("validation", "test"):
        (tmp_path / f"{split}.csv").write_text(f"de,en\nHaus,{split} house\nHund,{split} dog\n")
    flags = {
        "task": "translation",
        "data_dir": tmp_path,
        "source_column": "de",
        "target_column": "en",
        "max_source_length": 16,
        "doc_stride": 128,  # the default: of questions alone
    }
    evaluate(tmp_path / "full", **flags)
    baseline = {"baseline_predictions": tmp_path / "full/predictions.jsonl"}
    assert "vs_baseline" in evaluate(tmp_path / "same", **flags, **baseline)
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "test", **flags | {"do_eval": False, "do_predict": True}, **baseline)
    assert "other references of 2 samples, such as 0" in capsys.readouterr().err
    assert not (tmp_path / "test/predictions_test.jsonl").exists()
