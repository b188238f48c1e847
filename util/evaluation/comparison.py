"""Several settings on the same samples, interleaved: records, traces, and figures relative to full depth.

`decode_interleaved(settings, examples, evaluation)` decodes block by block, `decode_comparison` what is left
of a process's share; `compare(settings, evaluation)` gives one row of figures a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from datasets import Dataset

from models.errors import UserError
from models.exit_policy import ExitPolicy
from models.families import view_for
from models.languages import target_token_ids
from models.loading import LoadedModel
from models.trace import trace_layers
from util.analysis import GOOD_SHARE, pareto_front
from util.data.encoding import encoder_for
from util.evaluation.decode import (
    batch_indices,
    decode_batch,
    describe_batch,
    kept_samples,
    replay_calibration,
)
from util.evaluation.metrics import Measured
from util.evaluation.prediction_log import PredictionLog
from util.evaluation.records import EvaluationSettings, Record, Setting, Trace, best_windows
from util.evaluation.shards import Shards, share_out
from util.evaluation.significance import draw_scores, interval, sum_ratio_interval
from util.evaluation.summary import measure_samples, seconds_by_sample, summarize
from util.evaluation.timing_doubts import doubt_speedup, possible_speedup
from util.methods import BASELINE, HF_GENERATE
from util.progress import track
from util.tasks import TASKS

WARM_UP_SAMPLES = 3


@dataclass
class LiveSetting(Setting):
    """A setting with what decodes it. Without a policy that is Hugging Face's `generate`."""

    loaded: LoadedModel = field(kw_only=True)
    policy: ExitPolicy | None = field(kw_only=True)
    num_layers: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_layers = view_for(self.loaded.model).num_layers

    @property
    def group(self) -> tuple[str, int]:
        """Settings that share a baseline."""
        return self.checkpoint, self.batch_size


def warm_up(settings: list[LiveSetting], examples: Dataset, evaluation: EvaluationSettings) -> None:
    """Let every setting decode something before it is timed; policies that learn must be made anew after."""
    pairs = [*product(range(min(WARM_UP_SAMPLES, len(examples))), settings)]
    for index, setting in track(pairs, "Warming up", "output"):
        decode_batch(setting.loaded, setting.policy, examples.select([index]), evaluation)


def decode_interleaved(
    settings: list[LiveSetting],
    examples: Dataset,
    evaluation: EvaluationSettings,
    samples: range | None = None,
    keep: Callable[[list[Record]], Any] = lambda records: None,
) -> None:
    """All settings on one block of samples before the next, each block starting with another setting.

    A block is as large as the largest batch. `samples` are those to decode (default: all); `keep` is given
    the records of each finished block, marked with their setting and row.
    """
    samples = range(len(examples)) if samples is None else samples
    size = largest_batch(settings)
    blocks = list(batch_indices(samples.start, samples.stop, size))
    first_number = samples.start // size
    for number, block in enumerate(track(blocks, "Decoding", "block"), first_number):
        first = number % len(settings)
        for setting in settings[first:] + settings[:first]:
            for rows in batch_indices(block.start, block.stop, setting.batch_size):
                batch = examples.select(rows)
                decoded = decode_batch(setting.loaded, setting.policy, batch, evaluation)
                described = describe_batch(setting.loaded, batch, decoded)
                setting.records += [
                    mark_record(setting, row, record) for row, record in zip(rows, described, strict=True)
                ]
        keep([record for setting in settings for record in setting.records[-len(block) :]])


def mark_record(setting: LiveSetting, row: int, record: Record) -> Record:
    """A record with its setting and row; the source, alike for all settings, stays with full depth alone."""
    source = record.source if setting.method == BASELINE else None
    return replace(record, setting=setting.name, row=row, source=source)


def largest_batch(settings: list[LiveSetting]) -> int:
    return max(setting.batch_size for setting in settings)


def restore(settings: list[LiveSetting], log: PredictionLog, samples: range) -> range:
    """Give the settings their records of an interrupted comparison of `samples`; those left to decode."""
    records = log.records
    by_name: dict[str, list[Record]] = {setting.name: [] for setting in settings}
    for record in records:
        if record.setting not in by_name or record.row is None:
            raise UserError(
                f"{log.path}: not the records of this comparison: start afresh, --resume_eval False."
            )
        by_name[record.setting].append(record)
    done = kept_samples(min(map(len, by_name.values())), len(samples), largest_batch(settings))
    rest = range(samples.start + done, samples.stop)
    log.keep([record for record in records if record.row is not None and record.row < rest.start])
    for setting in settings:
        setting.records = by_name[setting.name][:done]
        replay_calibration(setting.policy, setting.records)
    return rest


def decode_rest(
    settings: list[LiveSetting],
    fresh: list[LiveSetting],
    examples: Dataset,
    evaluation: EvaluationSettings,
    rest: range,
    log: PredictionLog,
) -> None:
    """Decode what `restore` left over, logging each block; `fresh` are like the settings, to warm up with."""
    if rest:
        warm_up(fresh, examples, evaluation)
        decode_interleaved(settings, examples, evaluation, rest, log.append)


def decode_comparison(
    settings: list[LiveSetting],
    fresh: list[LiveSetting],
    examples: Dataset,
    evaluation: EvaluationSettings,
    identity: dict[str, Any],
    shards: Shards,
    begun: Callable[[], Any] = lambda: None,
) -> bool:
    """Decode this process's share of the examples with every setting, and what was interrupted of it.

    `fresh` are like the settings, to warm up with; `begun` is called by the process that will tell of all,
    once it is known that it may write. Whether the settings have the records of all processes now.
    """

    def decode(rows: range, log: PredictionLog) -> list[Record]:
        rest = restore(settings, log, rows)
        if shards.tells:
            begun()
        decode_rest(settings, fresh, examples, evaluation, rest, log)
        return log.records

    records = share_out(decode, len(examples), evaluation, identity, shards, len(settings))
    if records is None:
        return False
    if shards.index is None:
        begun()
    for setting in settings:
        setting.records = [record for record in records if record.setting == setting.name]
    return True


def trace_output(setting: LiveSetting, record: Record, source: str, evaluation: EvaluationSettings) -> Trace:
    """What every layer predicts at each token of a comparison's record."""
    assert record.row is not None  # as `mark_record` leaves it
    model, tokenizer = setting.loaded.model, setting.loaded.tokenizer
    encoder = encoder_for(setting.loaded, evaluation.max_source_length)
    inputs = encoder.inputs([source])
    sequence = encoder.sequence(model, inputs["input_ids"], target_token_ids(tokenizer, record.pieces))
    tensors = (inputs["input_ids"], inputs["attention_mask"], sequence)
    input_ids, mask, sequences = (tensor.to(model.device) for tensor in tensors)
    trace = trace_layers(model, input_ids, mask, sequences)
    return Trace(
        setting.name,
        record.row,
        record.id,
        record.pieces,
        record.exit_layers,
        confidences=trace.confidences[0].cpu().double().numpy(),
        agrees=trace.agrees[0].cpu().numpy(),
        deep=tokenizer.convert_ids_to_tokens(trace.tokens[0, :, -1].tolist()),
    )


def compare(settings: list[LiveSetting], evaluation: EvaluationSettings) -> list[dict[str, Any]]:
    """One row a setting: its own figures, and those relative to full depth, with 95% intervals."""
    quality = TASKS[evaluation.task].main_score
    baselines = {setting.group: setting for setting in settings if setting.method == BASELINE}
    measured = {
        setting.name: measure_samples(best_windows(setting.records), evaluation.task, evaluation.language)
        for setting in settings
    }
    own = {
        setting.name: summarize_setting(setting, measured[setting.name], evaluation) for setting in settings
    }
    draws = {name: draw_scores(corpus)[quality] for name, corpus in measured.items()}
    for setting in track(settings, "Comparing", "setting"):
        row, baseline = own[setting.name], baselines[setting.group]
        scores = row[quality], own[baseline.name][quality]
        row["interval"] = interval(draws[setting.name])
        row |= compare_quality(*scores, draws[setting.name], draws[baseline.name])
        row |= compare_speed(setting.records, baseline.records)
        row["unchanged"] = share_equal(setting.records, baseline.records)
        if row.get("ideal_speedup"):
            row["real_over_ideal"] = row["speedup"] / row["ideal_speedup"]
    return list(own.values())


def summarize_setting(
    setting: LiveSetting, measured: Measured, evaluation: EvaluationSettings
) -> dict[str, Any]:
    """A setting's own figures."""
    own = replace(evaluation, batch_size=setting.batch_size)
    summary = summarize(setting.records, measured, own, setting.num_layers)
    del summary["arguments"]
    return setting.as_row() | summary


def compare_quality(
    score: float, full_score: float, draws: np.ndarray, full_draws: np.ndarray
) -> dict[str, Any]:
    """Per cent of full depth's quality and the interval over paired resamples; None where it has none."""
    if full_score == 0 or (full_draws == 0).any():
        return {
            "quality_share": 100 * score / full_score if full_score else None,
            "quality_share_interval": None,
        }
    return {
        "quality_share": 100 * score / full_score,
        "quality_share_interval": interval(100 * draws / full_draws),
    }


def share_equal(records: list[Record], baseline: list[Record]) -> float:
    """Share of samples whose tokens are full depth's, all of them: of several windows, the chosen ones'."""
    pairs = zip(best_windows(records), best_windows(baseline), strict=True)
    return float(np.mean([ours.pieces == full.pieces for ours, full in pairs]))


def compare_speed(records: list[Record], baseline: list[Record]) -> dict[str, Any]:
    """Speed-up over the baseline: in total time, with its interval, and of the median sample; its doubt."""
    ours, theirs = (seconds_by_sample(rows) for rows in (records, baseline))
    speedup, bounds = sum(theirs) / sum(ours), sum_ratio_interval(theirs, ours)
    return {
        "speedup": speedup,
        "speedup_interval": bounds,
        "speedup_median": float(np.median(theirs) / np.median(ours)),
        "timing_doubt": doubt_speedup(speedup, bounds, possible_speedup(records, baseline)),
    }


def fastest_good(rows: list[dict[str, Any]]) -> dict[str, str | None]:
    """Of each method, the fastest setting at batch 1 that keeps 99% of full depth's quality."""
    best: dict[str, dict[str, Any] | None] = {}
    for row in at_batch_one(rows):
        current = best.setdefault(row["method"], None)
        good = row["quality_share"] is not None and row["quality_share"] >= GOOD_SHARE
        if good and (current is None or row["speedup"] > current["speedup"]):
            best[row["method"]] = row
    return {method: None if row is None else row["name"] for method, row in best.items()}


def name_front(rows: list[dict[str, Any]], quality: str) -> list[str]:
    """Names of the settings at batch 1 that no other beats in both speed-up and quality, fastest first."""
    candidates = sorted(at_batch_one(rows), key=lambda row: -row["speedup"])
    front = pareto_front([(row["speedup"], row[quality]) for row in candidates])
    return [candidates[index]["name"] for index in front]


def areas_under_curves(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each method on each checkpoint, the area under quality against latency, both relative to full depth.

    At a latency budget x in [0, 1], quality is the best of the settings within it, 0 below the fastest; full
    depth itself counts at x = 1. So the area is the mean share of full quality over uniform budgets.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in at_batch_one(rows):
        if row["method"] not in (BASELINE, HF_GENERATE) and row["quality_share"] is not None:
            curve = curves.setdefault(f"{row['method']} ({row['checkpoint']})", [])
            curve.append((1 / row["speedup"], row["quality_share"] / 100))
    return {name: area_under(points) for name, points in curves.items()}


def area_under(points: list[tuple[float, float]]) -> float:
    """Integral over [0, 1] of the highest y among points (x, y) at or left of each place."""
    area, best, place = 0.0, 0.0, 0.0
    for x, y in sorted(point for point in points if point[0] < 1):
        area += best * (x - place)
        best, place = max(best, y), x
    return area + best * (1 - place)


def at_batch_one(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["batch_size"] == 1)
