"""Learn a shortlist of the vocabulary for the confidence test: the most frequent target tokens of a split.

    python scripts/learn_shortlist.py --model_name_or_path checkpoints/debian-t5-free \
        --dataset_name debian_de_en --size 500 --output_file save/shortlist.json

The file serves `run.py --conf_shortlist`. It also says which share of the split's target tokens it covers.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError
from models.loading import LoadedModel, load_model
from util.arguments import DataArguments
from util.data import dataset_record, load_examples
from util.report import write_json
from util.tasks import DATASETS


def main() -> None:
    flags = parse_flags()
    try:
        loaded = load_model(flags.model_name_or_path)
        shortlist = learn_shortlist(loaded, load_split(flags, loaded), flags.size)
        flags.output_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(flags.output_file, shortlist)
        print(f"{len(shortlist['token_ids'])} tokens cover {shortlist['coverage']:.1%} of the targets")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="Whose tokenizer counts.")
    parser.add_argument("--dataset_name", required=True, choices=sorted(DATASETS))
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=500, help="Tokens on the shortlist, at least 2.")
    parser.add_argument("--output_file", type=Path, required=True)
    return parser.parse_args()


def load_split(flags: argparse.Namespace, loaded: LoadedModel) -> Dataset:
    data = DataArguments(task=DATASETS[flags.dataset_name].task, dataset_name=flags.dataset_name)
    return load_examples(dataset_record(data), data, flags.split, loaded.tokenizer)


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


if __name__ == "__main__":
    main()
