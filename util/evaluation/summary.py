"""What decoded samples come to: quality, latency and depth, intervals, and the test against a baseline.

Functions of records alone: they know nothing of models.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from models.errors import UserError
from util.evaluation.metrics import Reference, compute_scores, make_metric
from util.evaluation.records import EvaluationSettings, Record, best_windows, collect_outputs
from util.evaluation.significance import confidence_intervals, paired_bootstrap
from util.files import read_user_lines, write_json_lines


def summarize(records: list[Record], settings: EvaluationSettings, num_layers: int) -> dict[str, Any]:
    """Quality, latency and depth of all samples."""
    tokens = sum(record.tokens for record in records)
    seconds = sum(record.seconds for record in records)
    exits = [layer for record in records for layer in record.exit_layers or ()]
    samples = best_windows(records)
    results = {
        **score(samples, settings.task, settings.language),
        "samples": len(samples),
        "batch_size": settings.batch_size,
        "seconds": seconds,
        "seconds_per_sample_median": statistics.median(record.seconds for record in records),
        "tokens": tokens,
        "tokens_per_sample": tokens / len(records),
        "tokens_per_second": tokens / seconds,
        "ms_per_token": 1000 * seconds / tokens,
    }
    if exits:
        results |= summarize_depth(records, exits, tokens, num_layers)
    return results | {"arguments": settings.arguments}


def summarize_depth(records: list[Record], exits: list[int], tokens: int, num_layers: int) -> dict[str, Any]:
    """How deep tokens went and what that implies; `average_layers` includes catch-up."""
    totals = {
        name: sum(getattr(record, name) for record in records)
        for name in ("layer_calls", "layer_tokens", "full_layer_calls", "deep_passes", "rollbacks")
    }
    return {
        "average_layers": totals["layer_tokens"] / tokens,
        "layer_calls_per_token": totals["layer_calls"] / tokens,
        "ideal_speedup": totals["full_layer_calls"] / totals["layer_calls"],
        "exit_share": sum(layer < num_layers for layer in exits) / len(exits),
        "exit_layer_mean": statistics.mean(exits),
        "deep_passes": round(totals["deep_passes"]),
        "rollbacks": round(totals["rollbacks"]),
    }


def score(records: list[Record], task: str, language: str | None) -> dict[str, Any]:
    """The task's metrics; where the data set marks rows whose target is in train, also without them."""

    def of(rows: list[Record]) -> dict[str, float]:
        return compute_scores(task, *texts_of(rows), language)

    unseen = [row for row in records if not row.seen_in_train]
    scores = of(records)
    if 0 < len(unseen) < len(records):
        scores |= {f"{name}_unseen": value for name, value in of(unseen).items()}
    return scores


def judge(
    records: list[Record], settings: EvaluationSettings, baseline: dict[str, str] | None
) -> dict[str, Any]:
    """Confidence intervals, signatures and, where a baseline is given, the paired test against it."""
    predictions, references = texts_of(records)
    results: dict[str, Any] = {
        "confidence_intervals": confidence_intervals(
            settings.task, predictions, references, language=settings.language
        )
    }
    signatures = make_metric(settings.task, settings.language).signatures
    if signatures:
        results["signatures"] = signatures
    if baseline is not None:
        missing = [record.id for record in records if record.id not in baseline]
        if missing:
            where = f"--baseline_predictions {settings.baseline_predictions}"
            raise UserError(f"{where} lacks {len(missing)} samples, such as {missing[0]}.")
        theirs = [baseline[record.id] for record in records]
        results["vs_baseline"] = paired_bootstrap(
            settings.task, predictions, theirs, references, language=settings.language
        )
    return results


def texts_of(records: list[Record]) -> tuple[list[str], list[Reference]]:
    """Predictions and references."""
    return [row.prediction for row in records], [row.reference for row in records]


def read_baseline(path: Path | None) -> dict[str, str] | None:
    """Another system's prediction of each sample, by id.

    Raises:
        UserError: the file is not a predictions.jsonl.
    """
    if path is None:
        return None
    flag = "--baseline_predictions"
    outputs = collect_outputs(read_user_lines(path, flag), f"{flag} {path}")
    return {output.id: output.prediction for output in outputs}


def write_sample_scores(path: Path, records: list[Record], task: str, language: str | None) -> None:
    """One line a sample: its id and its own scores."""
    metric = make_metric(task, language)
    statistics = metric.statistics(*texts_of(records))
    rows = (
        {"id": record.id, **metric.scores(statistics[index : index + 1])}
        for index, record in enumerate(records)
    )
    write_json_lines(path, rows)
