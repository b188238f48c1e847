"""What decoded samples come to: quality, latency and depth, intervals, and the test against a baseline.

Functions of records alone: they know nothing of models.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.errors import UserError
from util.evaluation.metrics import Measured, Reference, measure
from util.evaluation.records import EvaluationSettings, Record, Referenced, best_windows, collect_samples
from util.evaluation.significance import confidence_intervals, draw_scores, paired_bootstrap
from util.files import read_user_lines, write_json_lines

Baseline = dict[str, Referenced]  # by id


def summarize(
    records: list[Record], measured: Measured, settings: EvaluationSettings, num_layers: int
) -> dict[str, Any]:
    """Quality, latency and depth of all samples, which are `measured`."""
    tokens = sum(record.tokens for record in records)
    seconds = sum(record.seconds for record in records)
    exits = [layer for record in records for layer in record.exit_layers or ()]
    samples = best_windows(records)
    results = {
        **score(samples, measured),
        "samples": len(samples),
        "batch_size": settings.batch_size,
        "seconds": seconds,
        "seconds_per_sample_median": statistics.median(seconds_by_sample(records)),
        "tokens": tokens,
        "tokens_per_sample": tokens / len(samples),
        "tokens_per_second": tokens / seconds,
        "ms_per_token": 1000 * seconds / tokens,
    }
    if exits:
        results |= summarize_depth(records, exits, tokens, num_layers)
    return results | {"arguments": settings.arguments}


def seconds_by_sample(records: list[Record]) -> list[float]:
    """Of each sample, with all windows of its context."""
    if records[0].window is None:
        return [record.seconds for record in records]
    sums: dict[str, float] = defaultdict(float)
    for record in records:
        sums[record.id] += record.seconds
    return list(sums.values())


def summarize_depth(records: list[Record], exits: list[int], tokens: int, num_layers: int) -> dict[str, Any]:
    """How deep tokens went and what that implies; `average_layers` includes catch-up."""
    names = ("layer_calls", "layer_tokens", "full_layer_calls", "deep_passes", "rollbacks")
    of_lookups = ("proposed_tokens", "accepted_proposals")
    totals = {name: sum(getattr(record, name) for record in records) for name in (*names, *of_lookups)}
    lookups = {name: round(totals[name]) for name in of_lookups} if totals["proposed_tokens"] else {}
    return {
        "average_layers": totals["layer_tokens"] / tokens,
        "layer_calls_per_token": totals["layer_calls"] / tokens,
        "ideal_speedup": totals["full_layer_calls"] / totals["layer_calls"],
        "exit_share": sum(layer < num_layers for layer in exits) / len(exits),
        "exit_layer_mean": statistics.mean(exits),
        "deep_passes": round(totals["deep_passes"]),
        "rollbacks": round(totals["rollbacks"]),
        **lookups,
    }


def measure_samples(samples: list[Record], task: str, language: str | None) -> Measured:
    return measure(task, *texts_of(samples), language)


def score(samples: list[Record], measured: Measured) -> dict[str, float]:
    """The task's metrics; where the data set marks rows whose target is in train, also without them."""
    unseen = [row for row, sample in enumerate(samples) if not sample.seen_in_train]
    scores = measured.scores()
    if 0 < len(unseen) < len(samples):
        scores |= {f"{name}_unseen": value for name, value in measured.scores(unseen).items()}
    return scores


def judge(
    samples: list[Record], measured: Measured, settings: EvaluationSettings, baseline: Baseline | None
) -> dict[str, Any]:
    """Confidence intervals, signatures and, where a baseline is given, the paired test against it."""
    draws = draw_scores(measured)
    results: dict[str, Any] = {"confidence_intervals": confidence_intervals(draws)}
    signatures = measured.metric.signatures
    if signatures:
        results["signatures"] = signatures
    if baseline is not None:
        theirs = [baseline[sample.id].prediction for sample in samples]
        references = [sample.reference for sample in samples]
        others = measure(settings.task, theirs, references, settings.language)
        results["vs_baseline"] = paired_bootstrap(measured, draws, others)
    return results


def texts_of(records: list[Record]) -> tuple[list[str], list[Reference]]:
    """Predictions and references."""
    return [row.prediction for row in records], [row.reference for row in records]


def read_baseline(path: Path | None) -> Baseline | None:
    """Another system's output for each sample, by id.

    Raises:
        UserError: the file is not a predictions.jsonl.
    """
    if path is None:
        return None
    flag = "--baseline_predictions"
    rows = ((place, Referenced.from_row(row, place)) for place, row in read_user_lines(path, flag))
    return {output.id: output for output in collect_samples(rows, f"{flag} {path}")}


def check_baseline(path: Path | None, baseline: Baseline, samples: Iterable[tuple[str, Reference]]) -> None:
    """Raise UserError unless the baseline, of the file `path`, has all samples: pairs of id and reference.

    Ids alone say little: rows of a table are numbered, in every split alike.
    """
    where = f"--baseline_predictions {path}"
    pairs = list(samples)
    missing = [name for name, _ in pairs if name not in baseline]
    if missing:
        raise UserError(f"{where} lacks {len(missing)} samples, such as {missing[0]}.")
    other = [name for name, reference in pairs if baseline[name].reference != reference]
    if other:
        raise UserError(
            f"{where} has other references of {len(other)} samples, such as {other[0]}: name the predictions "
            "for the same rows."
        )


def write_sample_scores(path: Path, samples: list[Record], measured: Measured) -> None:
    """One line a sample: its id and its own scores."""
    rows = ({"id": sample.id, **measured.scores([row])} for row, sample in enumerate(samples))
    write_json_lines(path, rows)
