"""Decode a split sample by sample, timed, writing each prediction as it comes; then sum up.

`evaluate(loaded, policy, examples, settings)` returns the results and leaves `predictions.jsonl` behind, from
which an interrupted evaluation continues.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers.generation import GenerateEncoderDecoderOutput

from models.decoding import DecodeStats, early_exit_decode
from models.errors import UserError
from models.exit_policy import ExitPolicy, FullDepth
from models.families import view_for
from models.json_files import decode_json, fits, read_text
from models.loading import LoadedModel
from models.threshold import AdaptiveThreshold
from util.data.examples import count_long_sources
from util.data.rows import SEEN_COLUMN, as_text
from util.evaluation.identity import hash_named_files, identify
from util.evaluation.metrics import Reference, compute_scores, make_metric
from util.evaluation.prediction_log import PredictionLog
from util.evaluation.significance import confidence_intervals, paired_bootstrap
from util.files import read_json_lines, write_json_lines
from util.progress import track
from util.tables import environment
from util.timing import Stopwatch

# How an evaluation decodes is its own affair, whatever a checkpoint's generation config says; what shapes the
# text (penalties, shortest length, forced tokens) stays the checkpoint's.
SETTLED = {
    "do_sample": False,
    "max_new_tokens": None,
    "max_time": None,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "cache_implementation": None,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
}


@dataclass
class EvaluationSettings:
    """`arguments` are recorded, and compared before an evaluation is continued."""

    task: str
    max_source_length: int
    max_length: int
    predictions_file: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    num_beams: int = 1
    synchronize: bool = True
    resume: bool = False
    baseline_predictions: Path | None = None
    language: str | None = None  # of targets, for metrics


@dataclass
class Decoded:
    """Output of one `generate` call."""

    sequences: list[list[int]]
    seconds: float
    stats: DecodeStats
    scores: list[float] | None = None  # mean log-probability of each sequence, where windows compete
    threshold: float | None = None  # of the first token; an adaptive one moves from sequence to sequence


def evaluate(
    loaded: LoadedModel, policy: ExitPolicy | None, examples: Dataset, settings: EvaluationSettings
) -> dict[str, Any] | None:
    """Decode all examples as `decode_split` does and sum them up; None where that returns None.

    Raises:
        UserError: asked to continue an evaluation that had other settings, or an unusable baseline.
    """
    baseline = read_baseline(settings.baseline_predictions)  # now, not after hours
    records = decode_split(loaded, policy, examples, settings)
    if records is None:
        return None
    results = summarize(records, settings, view_for(loaded.model).num_layers)
    samples = best_windows(records)
    scores_path = settings.predictions_file.with_suffix(".scores.jsonl")
    write_sample_scores(scores_path, samples, settings.task, settings.language)
    cut = count_long_sources(examples, loaded.tokenizer, settings.max_source_length)
    extra = {"truncated_sources": cut, "environment": environment(loaded.model)}
    return results | judge(samples, settings, baseline) | extra


def decode_split(
    loaded: LoadedModel, policy: ExitPolicy | None, examples: Dataset, settings: EvaluationSettings
) -> list[dict[str, Any]] | None:
    """Decode all examples (columns id, source, target), or those an interrupted evaluation left over.

    Processes share them as `share_out` says. (An adaptive threshold then learns from its own share.)
    """

    def decode(rows: range, log: PredictionLog) -> list[dict[str, Any]]:
        return decode_share(loaded, policy, examples.select(rows), settings, log)

    return share_out(decode, loaded, examples, settings)


def share_out(
    decode: Callable[[range, PredictionLog], list[dict[str, Any]]],
    loaded: LoadedModel,
    examples: Dataset,
    settings: EvaluationSettings,
) -> list[dict[str, Any]] | None:
    """Let every process `decode` its share of the rows into a log of its own.

    Under torchrun batches are as one process would form them; the first process gathers the records in order
    and returns them, the others None.
    """
    processes = PartialState()
    share = own_share(len(examples), settings.batch_size, processes)
    path = share_path(settings.predictions_file, processes.process_index, processes.num_processes)
    identity = settings.arguments | hash_named_files(settings.arguments) | identify(loaded, examples)
    identity |= {"processes": processes.num_processes}
    with PredictionLog(path, identity, settings.resume) as log:
        records = decode(share, log)
    if processes.num_processes > 1:
        processes.wait_for_everyone()
        if not processes.is_main_process:
            return None
        records = gather_shares(settings.predictions_file, processes.num_processes)
    return records


def decode_share(
    loaded: LoadedModel,
    policy: ExitPolicy | None,
    examples: Dataset,
    settings: EvaluationSettings,
    log: PredictionLog,
) -> list[dict[str, Any]]:
    """Records of this process's samples, those of an interrupted evaluation first."""
    done = len(log.records)
    if done < len(examples):  # else its last batch may be a short one
        log.keep(log.records[: done // settings.batch_size * settings.batch_size])
    replay_calibration(policy, log.records)
    batches = list(batch_indices(len(log.records), len(examples), settings.batch_size))
    if batches:
        warm_up = None if policy is None else FullDepth()
        decode_batch(loaded, warm_up, examples.select(batches[0]), settings)
    for indices in track(batches, "Decoding", "batch"):
        batch = examples.select(indices)
        decoded = decode_batch(loaded, policy, batch, settings)
        log.append(describe_batch(loaded, batch, decoded))
    return log.records


def own_share(total: int, batch_size: int, processes: PartialState) -> range:
    """The contiguous samples of this process: whole batches, the last share possibly shorter."""
    batches = -(-total // batch_size)
    per_process = -(-batches // processes.num_processes) * batch_size
    start = min(total, processes.process_index * per_process)
    return range(start, min(total, start + per_process))


def share_path(path: Path, index: int, processes: int) -> Path:
    return path if processes == 1 else path.with_suffix(f".part{index}.jsonl")


def gather_shares(path: Path, processes: int) -> list[dict[str, Any]]:
    """Records of all processes, in order; also written as one file."""
    parts = [share_path(path, index, processes) for index in range(processes)]
    records = [record for part in parts for _, record in read_json_lines(part)]
    write_json_lines(path, records)
    return records


def batch_indices(start: int, stop: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, stop)) for first in range(start, stop, size))


def decode_batch(
    loaded: LoadedModel, policy: ExitPolicy | None, batch: Dataset, settings: EvaluationSettings
) -> Decoded:
    """Tokenize and decode a few examples; only `generate`, encoder included, is timed.

    Without a policy Hugging Face's own loop decodes, which is also the one for beam search.
    """
    inputs = loaded.tokenizer(
        list(batch["source"]),
        max_length=settings.max_source_length,
        truncation=True,
        padding=True,
        return_tensors="pt",
    ).to(loaded.model.device)
    stats = DecodeStats()
    options = SETTLED | {"max_length": settings.max_length, "num_beams": settings.num_beams}
    competes = "window" in batch.column_names
    if competes:
        options |= {"return_dict_in_generate": True, "output_scores": True}
    if policy is not None:
        options |= {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
    with Stopwatch(loaded.model.device, settings.synchronize) as watch:
        output = loaded.model.generate(**inputs, **options)
    tokens = generated_tokens(loaded, output.sequences if competes else output)
    scores = sequence_scores(output, tokens) if competes else None
    threshold = getattr(policy, "threshold", None)
    return Decoded(tokens, watch.seconds, stats, scores, None if threshold is None else threshold.at(0))


def sequence_scores(output: GenerateEncoderDecoderOutput, tokens: list[list[int]]) -> list[float]:
    """Mean log-probability of the tokens of each sequence."""
    if getattr(output, "sequences_scores", None) is not None:  # beam search has its own
        return output.sequences_scores.tolist()
    log_probs = torch.stack([step.float().log_softmax(-1).amax(-1) for step in output.scores])  # (T, B)
    return [log_probs[: len(row), index].mean().item() for index, row in enumerate(tokens)]


def generated_tokens(loaded: LoadedModel, sequences: Tensor) -> list[list[int]]:
    """Token ids without start token and padding, end-of-sequence included."""
    ends = loaded.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for row in sequences[:, 1:].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:length])
    return rows


def describe_batch(loaded: LoadedModel, batch: Dataset, decoded: Decoded) -> list[dict[str, Any]]:
    """One record a sample. Time and work of a batch are shared out evenly over its samples."""
    texts = loaded.tokenizer.batch_decode(decoded.sequences, skip_special_tokens=True)
    size, stats = len(batch), decoded.stats
    shared = {
        "seconds": decoded.seconds / size,
        "layer_calls": stats.layer_calls / size,
        "layer_tokens": stats.layer_tokens / size,
        "deep_passes": stats.deep_passes / size,
        "rollbacks": stats.rollbacks / size,
        "full_layer_calls": stats.num_layers * max(map(len, stats.exit_layers), default=0) / size,
    }
    records = []
    for row, example in enumerate(batch):
        record = {
            "id": example["id"],
            "source": example["source"],
            "prediction": texts[row],
            "reference": example.get("references") or example["target"],
            "tokens": len(decoded.sequences[row]),
            "pieces": loaded.tokenizer.convert_ids_to_tokens(decoded.sequences[row]),
            "exit_layers": stats.exit_layers[row] if stats.exit_layers else None,
            **shared,
        }
        if decoded.threshold is not None:
            record["threshold"] = decoded.threshold
        if decoded.scores is not None:
            record |= {"window": example["window"], "sequence_score": decoded.scores[row]}
        if SEEN_COLUMN in example:
            record[SEEN_COLUMN] = example[SEEN_COLUMN]
        records.append(record)
    records[0]["calibration"] = stats.calibration
    return records


def replay_calibration(policy: ExitPolicy | None, records: list[dict[str, Any]]) -> None:
    """Teach a fresh adaptive threshold what it had learnt when the evaluation was interrupted."""
    threshold = getattr(policy, "threshold", None)
    if not isinstance(threshold, AdaptiveThreshold):
        return
    for record in records:
        if "calibration" in record:
            threshold.start_sequence()
            confidences, right = (
                zip(*record["calibration"], strict=True) if record["calibration"] else ((), ())
            )
            threshold.observe(list(confidences), list(right))


def summarize(records: list[dict[str, Any]], settings: EvaluationSettings, num_layers: int) -> dict[str, Any]:
    """Quality, latency and depth of all samples."""
    tokens = sum(record["tokens"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    exits = [layer for record in records for layer in record["exit_layers"] or ()]
    samples = best_windows(records)
    results = {
        **score(samples, settings.task, settings.language),
        "samples": len(samples),
        "batch_size": settings.batch_size,
        "seconds": seconds,
        "seconds_per_sample_median": statistics.median(record["seconds"] for record in records),
        "tokens": tokens,
        "tokens_per_sample": tokens / len(records),
        "tokens_per_second": tokens / seconds,
        "ms_per_token": 1000 * seconds / tokens,
    }
    if exits:
        results |= summarize_depth(records, exits, tokens, num_layers)
    return results | {"arguments": settings.arguments}


def summarize_depth(
    records: list[dict[str, Any]], exits: list[int], tokens: int, num_layers: int
) -> dict[str, Any]:
    """How deep tokens went and what that implies; `average_layers` includes catch-up."""
    totals = {
        name: sum(record[name] for record in records)
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


def best_windows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a sample: where a long context was split, its most probable answer."""
    if "window" not in records[0]:
        return records
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        rival = best.get(record["id"])
        if rival is None or record["sequence_score"] > rival["sequence_score"]:
            best[record["id"]] = record
    return list(best.values())


def score(records: list[dict[str, Any]], task: str, language: str | None) -> dict[str, Any]:
    """The task's metrics; where the data set marks rows whose target is in train, also without them."""

    def of(rows: list[dict[str, Any]]) -> dict[str, float]:
        return compute_scores(task, *texts_of(rows), language)

    unseen = [row for row in records if not row.get(SEEN_COLUMN, False)]
    scores = of(records)
    if 0 < len(unseen) < len(records):
        scores |= {f"{name}_unseen": value for name, value in of(unseen).items()}
    return scores


def judge(
    records: list[dict[str, Any]], settings: EvaluationSettings, baseline: dict[str, str] | None
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
        missing = [record["id"] for record in records if record["id"] not in baseline]
        if missing:
            where = f"--baseline_predictions {settings.baseline_predictions}"
            raise UserError(f"{where} lacks {len(missing)} samples, such as {missing[0]}.")
        theirs = [baseline[record["id"]] for record in records]
        results["vs_baseline"] = paired_bootstrap(
            settings.task, predictions, theirs, references, language=settings.language
        )
    return results


def texts_of(records: list[dict[str, Any]]) -> tuple[list[str], list[Reference]]:
    """Predictions and references."""
    return [row["prediction"] for row in records], [row["reference"] for row in records]


def read_baseline(path: Path | None) -> dict[str, str] | None:
    """Another system's prediction of each sample, by id.

    Raises:
        UserError: the file is not a predictions.jsonl.
    """
    if path is None:
        return None
    flag, rows = "--baseline_predictions", []
    for number, line in enumerate(read_text(path, flag).split("\n"), 1):
        if line.strip():
            place = f"{flag} {path}, line {number}"
            row = decode_json(line, place)
            if not (
                isinstance(row, dict) and fits(row.get("id"), str | int) and fits(row.get("prediction"), str)
            ):
                raise UserError(f"{place}: not a prediction of run.py, with an id and a prediction.")
            rows.append(row | {"id": as_text(row["id"])})
    if not rows:
        raise UserError(f"{flag} {path} holds no predictions.")
    try:
        return {row["id"]: row["prediction"] for row in best_windows(rows)}
    except (TypeError, KeyError) as error:
        raise UserError(f"{flag} {path} does not hold windows as run.py writes them.") from error


def write_sample_scores(path: Path, records: list[dict[str, Any]], task: str, language: str | None) -> None:
    """One line a sample: its id and its own scores."""
    metric = make_metric(task, language)
    statistics = metric.statistics(*texts_of(records))
    rows = (
        {"id": record["id"], **metric.scores(statistics[index : index + 1])}
        for index, record in enumerate(records)
    )
    write_json_lines(path, rows)
