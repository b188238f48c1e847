"""Train a SentencePiece vocabulary on both sides of a data set and save it as a T5 tokenizer.

python scripts/train_tokenizer.py --dataset_name debian_de_en --vocab_size 4096 --output_dir save/tokenizer
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sentencepiece
from transformers import T5Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import one_line_errors
from util.arguments import DataArguments, locked_output_dir, whole_number
from util.data import dataset_record, load_examples
from util.tasks import DATASETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_name", required=True, choices=tuple(DATASETS))
    parser.add_argument("--vocab_size", type=whole_number, default=4096)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    with one_line_errors(), locked_output_dir(arguments.output_dir):
        train(arguments.dataset_name, arguments.vocab_size, arguments.output_dir)


def train(dataset_name: str, vocab_size: int, output_dir: Path) -> None:
    """Write `spiece.model` and the tokenizer made from it."""
    data_args = DataArguments(task=DATASETS[dataset_name].task, dataset_name=dataset_name)
    rows = load_examples(dataset_record(data_args), data_args, "train")
    texts = [text for row in rows for text in (row["source"], row["target"])]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(output_dir / "spiece"),
        vocab_size=vocab_size,
        character_coverage=0.9998,
        pad_id=0,  # T5's order of special tokens
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (output_dir / "spiece.vocab").unlink()
    tokenizer = T5Tokenizer.from_pretrained(output_dir, extra_ids=0, model_max_length=512)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
