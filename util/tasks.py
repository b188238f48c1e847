"""Tasks and data sets as records: what is read, how a sample becomes text, how outputs are judged.

A new data set is one more row of DATASETS; a new task one more row of TASKS.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Task:
    """`metric` names one of `util.evaluation.metrics`; `main_score` the figure that compares methods.

    Models without an encoder are asked by `prompt`, or by `message` through a chat template.
    """

    metric: str
    main_score: str
    prompt: str
    message: str


@dataclass(frozen=True)
class DatasetRecord:
    """Where rows come from and which columns matter. `languages` are (source, target) keys of a
    `translation` column; `folder` holds local `{split}.jsonl.gz` files instead of a hub id."""

    task: str
    source: str
    target: str
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    folder: Path | None = None
    prefix: str = ""
    languages: tuple[str, str] | None = None
    max_source_length: int = 512
    max_target_length: int = 128
    training: dict[str, Any] = field(default_factory=dict)  # the FREE paper's flags, for --paper_settings
    splits: dict[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )


TASKS = {
    "summarization": Task(
        "rouge", "rougeLsum", "{source}\n\nSummary:", "Summarize the following text.\n\n{source}"
    ),
    "translation": Task(
        "bleu", "bleu", "{source}\n\nTranslation:",
        "Translate from {source_lang} to {target_lang}. Answer with the translation alone.\n\n{source}",
    ),
    "question_answering": Task(
        "squad", "f1", "{source}\n\nAnswer:",
        "Answer the question with words of its context, as few as possible.\n\n{source}",
    ),
}  # fmt: skip

PARQUET = "refs/convert/parquet"  # where the hub keeps script data sets as plain files


def paper_flags(epochs: int, batch_size: int, processes: int, eval_batch_size: int) -> dict[str, Any]:
    """Adafactor at 1e-4; fewer processes than the authors had accumulate gradients to the same batch. All of
    the paper's settings, and why some of ours are others: docs/paper_experiments.md."""
    return {
        "learning_rate": 1e-4,
        "optim": "adafactor",
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": eval_batch_size,
        "gradient_accumulation_steps": max(1, processes // int(os.environ.get("WORLD_SIZE", 1))),
    }


DATASETS = {
    "samsum": DatasetRecord(
        "summarization", "dialogue", "summary", hub_id="knkarthick/samsum", prefix="summarize: ",
        training=paper_flags(epochs=20, batch_size=4, processes=2, eval_batch_size=32),
    ),
    "cnn_dailymail": DatasetRecord(
        "summarization", "article", "highlights", hub_id="abisee/cnn_dailymail", config="3.0.0",
        prefix="summarize: ", training=paper_flags(epochs=3, batch_size=4, processes=4, eval_batch_size=16),
    ),
    "multi_news": DatasetRecord(
        "summarization", "document", "summary", hub_id="alexfabbri/multi_news", revision=PARQUET,
        prefix="summarize: ", max_source_length=2048, max_target_length=512,
        training=paper_flags(epochs=3, batch_size=2, processes=2, eval_batch_size=16),
    ),
    "big_patent": DatasetRecord(
        "summarization", "description", "abstract", hub_id="NortheasternUniversity/big_patent", config="e",
        revision=PARQUET, prefix="summarize: ", max_source_length=2048, max_target_length=512,
        training=paper_flags(epochs=3, batch_size=2, processes=2, eval_batch_size=16),
    ),
    "squad": DatasetRecord(
        "question_answering", "question", "answers", hub_id="rajpurkar/squad",
        splits={"train": "train", "validation": "validation", "test": "validation"}, max_target_length=30,
        training=paper_flags(epochs=10, batch_size=4, processes=2, eval_batch_size=32),
    ),
    "iwslt2017": DatasetRecord(
        "translation", "translation", "translation", hub_id="IWSLT/iwslt2017", config="iwslt2017-de-en",
        revision=PARQUET, languages=("de", "en"), prefix="translate German to English: ",
        max_source_length=1024,
        training=paper_flags(epochs=2, batch_size=2, processes=4, eval_batch_size=16),
    ),
    "debian_de_en": DatasetRecord(
        "translation", "translation", "translation", folder=DATA_FOLDER / "debian" / "debian_de_en",
        languages=("de", "en"),
    ),
    "debian_synopsis": DatasetRecord(
        "summarization", "document", "summary", folder=DATA_FOLDER / "debian" / "debian_synopsis",
        prefix="summarize: ",
    ),
}  # fmt: skip
