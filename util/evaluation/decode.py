"""Decode a split sample by sample, timed, writing each prediction as it comes; then sum up.

`evaluate(loaded, policy, examples, settings)` returns the results and leaves `predictions.jsonl` behind, from
which an interrupted evaluation continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.generation import GenerateEncoderDecoderOutput

from models.auto_exit import AutoExit
from models.decode_stats import DecodeStats
from models.errors import UserError
from models.exit_policy import ExitPolicy, FullDepth
from models.loading import LoadedModel
from models.threshold import AdaptiveThreshold
from util.data.encoding import encoder_for
from util.data.examples import count_long_sources
from util.data.rows import SEEN_COLUMN
from util.environment import environment
from util.evaluation.identity import hash_named_files, identify
from util.evaluation.metrics import Reference
from util.evaluation.prediction_log import PredictionLog
from util.evaluation.records import EvaluationSettings, Record, best_windows
from util.evaluation.shards import launched_shards, share_out
from util.evaluation.summary import (
    check_baseline,
    judge,
    measure_samples,
    read_baseline,
    summarize,
    write_sample_scores,
)
from util.generate_options import greedy_options
from util.progress import track
from util.timing import Stopwatch


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
        UserError: asked to continue an evaluation that had other settings, or one that learnt what it cannot
            learn again, or an unusable baseline.
    """
    baseline = read_baseline(settings.baseline_predictions)
    if baseline is not None:  # now, not after hours
        pairs = ((example["id"], reference_of(example)) for example in examples)
        check_baseline(settings.baseline_predictions, baseline, pairs)
    scores = settings.predictions_file.with_suffix(".scores.jsonl")
    settings = replace(settings, outcomes=(scores, *settings.outcomes))
    records = decode_split(loaded, policy, examples, settings)
    if records is None:
        return None
    samples = best_windows(records)
    measured = measure_samples(samples, settings.task, settings.language)
    results = summarize(records, measured, settings, loaded.view.num_layers)
    write_sample_scores(scores, samples, measured)
    cut = count_long_sources(examples, encoder_for(loaded, settings.max_source_length))
    extra = {"truncated_sources": cut, "environment": environment(loaded)}
    return results | judge(samples, measured, settings, baseline) | extra


def decode_split(
    loaded: LoadedModel, policy: ExitPolicy | None, examples: Dataset, settings: EvaluationSettings
) -> list[Record] | None:
    """Decode all examples (columns id, source, target), or those an interrupted evaluation left over.

    Processes share them as `share_out` says.
    """

    def decode(rows: range, log: PredictionLog) -> list[Record]:
        return decode_share(loaded, policy, examples.select(rows), settings, log)

    identity = identify_run(loaded, examples, settings)
    return share_out(decode, len(examples), settings, identity, launched_shards())


def identify_run(loaded: LoadedModel, examples: Dataset, settings: EvaluationSettings) -> dict[str, Any]:
    """All that the records depend on."""
    return settings.arguments | hash_named_files(settings.arguments) | identify(loaded, examples)


def decode_share(
    loaded: LoadedModel,
    policy: ExitPolicy | None,
    examples: Dataset,
    settings: EvaluationSettings,
    log: PredictionLog,
) -> list[Record]:
    """Records of this process's samples, those of an interrupted evaluation first."""
    done = len(log.records)
    if done < len(examples):
        refuse_forgetful(policy, done)
        log.keep(log.records[: kept_samples(done, len(examples), settings.batch_size)])
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


def kept_samples(done: int, total: int, batch_size: int) -> int:
    """Of the samples that were decoded, those after which to go on: of whole batches, the last of which may
    be a short one."""
    return done if done == total else done // batch_size * batch_size


def batch_indices(start: int, stop: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, stop)) for first in range(start, stop, size))


def decode_batch(
    loaded: LoadedModel, policy: ExitPolicy | None, batch: Dataset, settings: EvaluationSettings
) -> Decoded:
    """Tokenize and decode a few examples; only `generate`, encoder included, is timed.

    Without a policy Hugging Face's own loop decodes, which is also the one for beam search.
    """
    encoder = encoder_for(loaded, settings.max_source_length)
    inputs = encoder.inputs(list(batch["source"])).to(loaded.model.device)
    stats = DecodeStats()
    options = greedy_options(encoder.output_limit(settings.max_length)) | {"num_beams": settings.num_beams}
    competes = "window" in batch.column_names
    if competes:
        options |= {"return_dict_in_generate": True, "output_scores": True}
    if policy is not None:
        options |= {"exit_policy": policy, "decode_stats": stats}
    decode: Callable[..., Any] = loaded.model.generate if policy is None else loaded.generate
    with Stopwatch(loaded.model.device, settings.synchronize) as watch:
        output = decode(**inputs, **options)
    start = encoder.output_start(inputs["input_ids"])
    rows = generated_tokens(loaded, output.sequences if competes else output, start)
    tokens = [encoder.ended(row) for row in rows]
    scores = sequence_scores(output, tokens) if competes else None
    threshold = getattr(policy, "threshold", None)
    return Decoded(tokens, watch.seconds, stats, scores, None if threshold is None else threshold.at(0))


def sequence_scores(output: GenerateEncoderDecoderOutput, tokens: list[list[int]]) -> list[float]:
    """Mean log-probability of the tokens of each sequence."""
    if getattr(output, "sequences_scores", None) is not None:  # beam search has its own
        return output.sequences_scores.tolist()
    log_probs = torch.stack([step.float().log_softmax(-1).amax(-1) for step in output.scores])  # (T, B)
    return [log_probs[: len(row), index].mean().item() for index, row in enumerate(tokens)]


def generated_tokens(loaded: LoadedModel, sequences: Tensor, start: int = 1) -> list[list[int]]:
    """Token ids from `start` on, behind start token or prompt, without padding, end-of-sequence included."""
    ends = loaded.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for row in sequences[:, start:].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:length])
    return rows


def describe_batch(loaded: LoadedModel, batch: Dataset, decoded: Decoded) -> list[Record]:
    """One record a sample. Time and work of a batch are shared out evenly over its samples."""
    texts = encoder_for(loaded).texts(decoded.sequences)
    size, stats = len(batch), decoded.stats
    shared: dict[str, Any] = {
        "seconds": decoded.seconds / size,
        "layer_calls": stats.layer_calls / size,
        "layer_tokens": stats.layer_tokens / size,
        "deep_passes": stats.deep_passes / size,
        "rollbacks": stats.rollbacks / size,
        "proposed_tokens": stats.proposed_tokens / size,
        "accepted_proposals": stats.accepted_proposals / size,
        "full_layer_calls": stats.num_layers * max(map(len, stats.exit_layers), default=0) / size,
        "threshold": decoded.threshold,
    }
    records = [
        Record(
            example["id"],
            texts[row],
            reference=reference_of(example),
            tokens=len(decoded.sequences[row]),
            pieces=loaded.tokenizer.convert_ids_to_tokens(decoded.sequences[row]),
            exit_layers=stats.exit_layers[row] if stats.exit_layers else None,
            source=example["source"],
            window=example.get("window"),
            sequence_score=None if decoded.scores is None else decoded.scores[row],
            seen_in_train=example.get(SEEN_COLUMN),
            **shared,
        )
        for row, example in enumerate(batch)
    ]
    records[0].calibration = [list(pair) for pair in stats.calibration]
    return records


def reference_of(example: dict[str, Any]) -> Reference:
    """What a sample's output is judged by."""
    return example.get("references") or example["target"]


def refuse_forgetful(policy: ExitPolicy | None, done: int) -> None:
    """Raise UserError for a policy that learnt from the `done` records and is not told of it again."""
    if done and isinstance(policy, AutoExit):
        raise UserError(
            f"--resume_eval True would let --auto_exit learn anew after {done} outputs, by whose seconds it "
            "had chosen: start afresh with --resume_eval False."
        )


def replay_calibration(policy: ExitPolicy | None, records: list[Record]) -> None:
    """Teach a fresh adaptive threshold what it had learnt when the evaluation was interrupted."""
    threshold = getattr(policy, "threshold", None)
    if not isinstance(threshold, AdaptiveThreshold):
        return
    for record in records:
        if record.calibration is not None:
            threshold.start_sequence()
            threshold.observe([(confidence, bool(right)) for confidence, right in record.calibration])
