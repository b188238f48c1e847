"""From timed outputs to a row of figures for each contestant, and what the machine could do at best."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.choices import MIXED
from scripts.benchmarking.contestants import Contestant, Output
from scripts.benchmarking.subjects import Subject
from util.evaluation.metrics import compute_scores
from util.methods import BASELINE
from util.script_arguments import CTRANSLATE2
from util.timing import Stopwatch

BYTES = {
    "fp32": 4,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "w8": 1 + 4 / 64,
    MIXED: 1 + 4 / 64,
    "w4": 1 / 2 + 4 / 32,
    "int8": 1,
}  # of a weight and its scale
ROUNDED = ("w8", MIXED, "w4", "int8")
MEMORY_WEIGHTS = ("EncDecAttention.k.", "EncDecAttention.v.", "encoder_attn.k_proj.", "encoder_attn.v_proj.")
READ_BYTES = {"cpu": 512 * 2**20, "cuda": 2**32}  # more than caches hold
READ_TIMES = 7


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device, or torch's threads, read from memory, at best."""
    size, seconds = READ_BYTES[device.type], []
    numbers = torch.ones(size // 4, device=device)
    for _ in range(READ_TIMES):
        with Stopwatch(device) as watch:
            numbers.sum()
        seconds.append(watch.seconds)
    return size / min(seconds)


@dataclass
class Floor:
    """The time that reading weights takes alone: all that decoder layers and head need for one token. What
    the encoder and the projection of its output read, once a source, is left out."""

    layers: int
    layer_weights: int  # of one layer
    head_weights: int
    bandwidth: float

    @classmethod
    def of(cls, subject: Subject, bandwidth: float) -> Floor:
        view = subject.loaded.view
        sizes = [count_token_weights(layer) for layer in view.layers]
        head = subject.loaded.model.get_output_embeddings().weight.numel()
        return cls(view.num_layers, sum(sizes) // len(sizes), head, bandwidth)

    def seconds(self, output: Output, precision: str) -> float:
        """Of the passes that an output took; each step reads the head at least once."""
        if output.stats is None:
            steps = max(map(len, output.tokens))
            calls = steps * self.layers
        else:
            steps, calls = output.stats.steps, output.stats.layer_calls
        weights = calls * self.layer_weights + steps * self.head_weights
        return weights * BYTES[precision] / self.bandwidth


def count_token_weights(layer: nn.Module) -> int:
    """Weights of a decoder layer that every token reads."""
    named = layer.named_parameters()
    return sum(weight.numel() for name, weight in named if not any(part in name for part in MEMORY_WEIGHTS))


def make_rows(
    subject: Subject, contestants: list[Contestant], outputs: dict[str, list[Output]], floor: Floor
) -> list[dict[str, Any]]:
    """One row a contestant; `outputs` holds its batches by name."""
    rows = [describe(subject, one, outputs[one.name], floor) for one in contestants]
    paces = {row["name"]: row["ms_per_token"] for row in rows}
    tokens = {name: [row for output in batches for row in output.tokens] for name, batches in outputs.items()}
    exact = [one.name for one in contestants if one.method == BASELINE and one.precision not in ROUNDED]
    for row in rows:
        pace, full = row["ms_per_token"], f"{row['backend']} {BASELINE}"
        for rival in CTRANSLATE2:
            row[f"over_{rival.lower().replace(' ', '_')}"] = paces[rival] / pace if rival in paces else None
        if full in paces and row["method"] != BASELINE:
            row["speedup"] = paces[full] / pace
            row["real_over_ideal"] = row["speedup"] / row["ideal_speedup"]
        if subject.trained:
            found = tokens[row["name"]]
            row["agreement"] = share_of_equal(found, tokens[exact[0]]) if exact else None
            row["unchanged"] = share_of_equal(found, tokens[full]) if full in tokens else None
    return rows


def share_of_equal(rows: list[list[int]], others: list[list[int]]) -> float:
    return sum(one == other for one, other in zip(rows, others, strict=True)) / len(rows)


def describe(subject: Subject, contestant: Contestant, outputs: list[Output], floor: Floor) -> dict[str, Any]:
    """A contestant's own figures. All but totals are medians over batches."""
    counts = [sum(map(len, output.tokens)) for output in outputs]
    paces = [1000 * output.seconds / count for output, count in zip(outputs, counts, strict=True)]
    floors = [
        1000 * floor.seconds(output, contestant.precision) / count
        for output, count in zip(outputs, counts, strict=True)
    ]
    row = {
        "name": contestant.name,
        "backend": contestant.backend,
        "method": contestant.method,
        "tokens": sum(counts),
        "tokens_per_second": sum(counts) / sum(output.seconds for output in outputs),
        "ms_per_token": statistics.median(paces),
        "floor_ms_per_token": statistics.median(floors),
        "over_floor": statistics.median(pace / least for pace, least in zip(paces, floors, strict=True)),
    }
    stats = [output.stats for output in outputs if output.stats is not None]
    if stats:
        names = ("ideal_speedup", "average_layers", "exit_share")
        row |= {name: statistics.median(getattr(one, name) for one in stats) for name in names}
    references = [text for batch in subject.batches for text in batch.references]
    if references:
        rows = [tokens for output in outputs for tokens in output.tokens]
        texts = subject.loaded.tokenizer.batch_decode(rows, skip_special_tokens=True)
        row["bleu"] = compute_scores("translation", texts, references, "en")["bleu"]
    return row
