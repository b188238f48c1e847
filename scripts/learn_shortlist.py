"""Learn a shortlist of the vocabulary for the confidence test: the most frequent target tokens of a split.

    python scripts/learn_shortlist.py --model_name_or_path checkpoints/debian-t5-free \
        --dataset_name debian_de_en --size 500 --output_file save/shortlist.json

The file serves `run.py --conf_shortlist`. It also says which share of the split's target tokens it covers
and, along full depth's outputs on the validation split, how its decisions differ from the full softmax's.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.confidence import ShortlistGap, SoftmaxGap
from models.decoder_view import view_for
from models.errors import UserError, one_line_errors
from models.loading import LoadedModel, load_model
from models.trace import trace_layers
from util.arguments import DataArguments
from util.data import dataset_record, load_examples
from util.report import comparison_table, print_report, write_json
from util.tasks import DATASETS

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = {
    "threshold": "threshold",
    "full_exits": "exits",
    "shortlist_exits": "exits, shortlist",
    "decisions_changed": "changed",
    "full_wrong_exits": "wrong exits",
    "shortlist_wrong_exits": "wrong exits, shortlist",
}


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    with one_line_errors():
        loaded = load_model(flags.model_name_or_path)
        shortlist = learn_shortlist(loaded, load_split(flags, loaded, flags.split), flags.size)
        flags.output_file.parent.mkdir(parents=True, exist_ok=True)
        shortlist["decisions"] = measure_decisions(flags, loaded, shortlist["token_ids"])
        write_json(flags.output_file, shortlist)
        print(f"{len(shortlist['token_ids'])} tokens cover {shortlist['coverage']:.1%} of the targets")
        print_report(comparison_table("Decisions against the full softmax", COLUMNS, shortlist["decisions"]))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="Whose tokenizer counts.")
    parser.add_argument("--dataset_name", required=True, choices=sorted(DATASETS))
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--size", type=int, default=500, help="Tokens on the shortlist, at least 2.")
    parser.add_argument("--shallow_layer", type=int, help="Where decisions are compared (default: its own).")
    parser.add_argument("--num_samples", type=int, default=100, help="Validation samples of the comparison.")
    parser.add_argument("--max_length", type=int, default=64, help="Of their outputs.")
    parser.add_argument("--output_file", type=Path, required=True)
    return parser.parse_args(argv)


def load_split(
    flags: argparse.Namespace, loaded: LoadedModel, split: str, limit: int | None = None
) -> Dataset:
    data = DataArguments(task=DATASETS[flags.dataset_name].task, dataset_name=flags.dataset_name)
    return load_examples(dataset_record(data), data, split, loaded.tokenizer, limit)


def learn_shortlist(loaded: LoadedModel, examples: Dataset, size: int) -> dict[str, Any]:
    """The `size` most frequent target tokens (fewer if the split has fewer), by falling frequency."""
    if size < 2:
        raise UserError(f"--size must be at least 2, got {size}.")
    counts = Counter(
        token for row in loaded.tokenizer(list(examples["target"]))["input_ids"] for token in row
    )
    frequent = counts.most_common(size)
    coverage = sum(count for _, count in frequent) / counts.total()
    return {"token_ids": [token for token, _ in frequent], "coverage": coverage}


def measure_decisions(
    flags: argparse.Namespace, loaded: LoadedModel, token_ids: list[int]
) -> list[dict[str, float]]:
    """At each threshold: the share of tokens that would exit and, of all tokens, those that would wrongly."""
    layer = flags.shallow_layer or loaded.exit_config.shallow_exit_layer
    if layer is None:
        raise UserError(f"{flags.model_name_or_path} was not trained with an exit: name a --shallow_layer.")
    depth = view_for(loaded.model).num_layers
    if not 1 <= layer < depth:
        raise UserError(f"--shallow_layer must lie in 1..{depth - 1}, got {layer}.")
    measures = (SoftmaxGap(), ShortlistGap(view_for(loaded.model), torch.tensor(token_ids)))
    confidences: list[list[Tensor]] = [[], []]
    agrees = []
    for source in load_split(flags, loaded, "validation", flags.num_samples)["source"]:
        inputs = loaded.tokenizer(source, truncation=True, max_length=512, return_tensors="pt")
        sequences = loaded.model.generate(**inputs, max_length=flags.max_length, do_sample=False)
        for found, measure in zip(confidences, measures, strict=True):
            trace = trace_layers(loaded.model, **inputs, sequences=sequences, confidence=measure)
            found.append(trace.confidences[0, :, layer - 1])
        agrees.append(trace.agrees[0, :, layer - 1])
    full, short = (torch.cat(found) for found in confidences)
    return [compare_decisions(full, short, torch.cat(agrees), threshold) for threshold in THRESHOLDS]


def compare_decisions(full: Tensor, short: Tensor, agrees: Tensor, threshold: float) -> dict[str, float]:
    """Both measures' exits at one threshold, from the confidences (N,) of N tokens."""
    full_exits, short_exits = full > threshold, short > threshold
    return {
        "threshold": threshold,
        "full_exits": full_exits.float().mean().item(),
        "shortlist_exits": short_exits.float().mean().item(),
        "decisions_changed": (full_exits != short_exits).float().mean().item(),
        "full_wrong_exits": (full_exits & ~agrees).float().mean().item(),
        "shortlist_wrong_exits": (short_exits & ~agrees).float().mean().item(),
    }


if __name__ == "__main__":
    main()
