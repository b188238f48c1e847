"""Decode a split sample by sample, timed, writing each prediction as it comes; then sum up.

`evaluate(loaded, policy, examples, settings)` returns the results and leaves `predictions.jsonl` behind, from
which an interrupted evaluation continues.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from models.decoder_view import view_for
from models.decoding import DecodeStats, early_exit_decode
from models.errors import UserError
from models.exit_policy import ExitPolicy, FullDepth
from models.loading import LoadedModel
from models.threshold import AdaptiveThreshold
from util.data import SEEN_COLUMN
from util.metrics import METRICS
from util.report import environment, write_json
from util.tasks import TASKS
from util.timing import Stopwatch


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


@dataclass
class Decoded:
    """Output of one `generate` call."""

    sequences: list[list[int]]
    seconds: float
    stats: DecodeStats


def evaluate(
    loaded: LoadedModel, policy: ExitPolicy | None, examples: Dataset, settings: EvaluationSettings
) -> dict[str, Any]:
    """Decode all examples (columns id, source, target), or those an interrupted evaluation left over.

    Raises:
        UserError: asked to continue an evaluation that had other settings.
    """
    log = PredictionLog(settings.predictions_file, settings.arguments | {"weights": fingerprint(loaded)})
    done = log.reopen() if settings.resume else log.start()
    done = log.keep(done[: len(done) // settings.batch_size * settings.batch_size])
    replay_calibration(policy, done)
    batches = list(batch_indices(len(done), len(examples), settings.batch_size))
    if batches:
        warm_up = None if policy is None else FullDepth()
        decode_batch(loaded, warm_up, examples.select(batches[0]), settings)
    progress = tqdm(batches, desc="Decoding", unit="batch", disable=None)
    for indices in progress:
        batch = examples.select(indices)
        decoded = decode_batch(loaded, policy, batch, settings)
        done += log.append(describe_batch(loaded, batch, decoded))
    log.close()
    num_layers = view_for(loaded.model).num_layers
    return summarize(done, settings, num_layers) | {"environment": environment(loaded.model)}


def fingerprint(loaded: LoadedModel) -> str:
    """Tells weights (and their precision) from others: sums that any training step changes."""
    sums = [weight.double().sum().item() for weight in loaded.model.parameters()]
    return f"{loaded.model.dtype}:{hashlib.sha256(repr(sums).encode()).hexdigest()[:16]}"


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
    options = {"max_length": settings.max_length, "num_beams": settings.num_beams, "do_sample": False}
    if policy is not None:
        options |= {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
    with Stopwatch(loaded.model.device, settings.synchronize) as watch:
        sequences = loaded.model.generate(**inputs, **options)
    return Decoded(generated_tokens(loaded, sequences), watch.seconds, stats)


def generated_tokens(loaded: LoadedModel, sequences: Tensor) -> list[list[int]]:
    """Token ids without start token and padding, end-of-sequence included."""
    end = loaded.tokenizer.eos_token_id
    rows = []
    for row in sequences[:, 1:].tolist():
        rows.append(row[: row.index(end) + 1] if end in row else row)
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
            "prediction": texts[row],
            "reference": example["target"],
            "tokens": len(decoded.sequences[row]),
            "pieces": loaded.tokenizer.convert_ids_to_tokens(decoded.sequences[row]),
            "exit_layers": stats.exit_layers[row] if stats.exit_layers else None,
            **shared,
        }
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


class PredictionLog:
    """predictions.jsonl: one line a sample, flushed at once; the settings lie beside it."""

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self.path = path
        self.settings_path = path.with_name(path.stem + ".settings.json")
        self.arguments = json.loads(json.dumps(arguments))

    def start(self) -> list[dict[str, Any]]:
        """Begin a new file; the old predictions go first, so that no kill leaves them under new settings."""
        self.path.unlink(missing_ok=True)
        write_json(self.settings_path, self.arguments)
        return []

    def reopen(self) -> list[dict[str, Any]]:
        """Records of an interrupted evaluation; a line cut off by the interruption is dropped."""
        if not self.path.is_file():
            return self.start()
        self._refuse_other_settings()
        *lines, _ = self.path.read_bytes().split(b"\n")  # what follows the last newline was cut off
        return [json.loads(line) for line in lines]

    def keep(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave exactly these records in the file and open it for more."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf8")
        temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf8")
        return records

    def append(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self.file.flush()
        return records

    def close(self) -> None:
        self.file.close()

    def _refuse_other_settings(self) -> None:
        if not self.settings_path.is_file():
            raise UserError(f"--resume_eval: {self.settings_path} is missing; set --resume_eval False.")
        before = json.loads(self.settings_path.read_text(encoding="utf8"))
        changed = sorted(
            name for name in {*before, *self.arguments} if before.get(name) != self.arguments.get(name)
        )
        if changed:
            raise UserError(
                f"--resume_eval: {self.path} was begun with another {', '.join(changed)}; "
                "use the same flags, or start afresh with --resume_eval False."
            )


def summarize(records: list[dict[str, Any]], settings: EvaluationSettings, num_layers: int) -> dict[str, Any]:
    """Quality, latency and depth of all samples."""
    tokens = sum(record["tokens"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    exits = [layer for record in records for layer in record["exit_layers"] or ()]
    results = {
        **score(records, settings.task),
        "samples": len(records),
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


def score(records: list[dict[str, Any]], task: str) -> dict[str, float]:
    """The task's metrics; where the data set marks rows whose target is in train, also without them."""
    metric = METRICS[TASKS[task].metric]

    def of(rows: list[dict[str, Any]]) -> dict[str, float]:
        return metric([row["prediction"] for row in rows], [row["reference"] for row in rows])

    unseen = [row for row in records if not row.get(SEEN_COLUMN, False)]
    scores = of(records)
    if 0 < len(unseen) < len(records):
        scores |= {f"{name}_unseen": value for name, value in of(unseen).items()}
    return scores
