"""Tasks and data sets as records: what is read, how a sample becomes text, how outputs are judged.

A new data set is one more row of DATASETS; a new task one more row of TASKS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Task:
    """`metric` is the name of a function in `util.metrics`; `main_score` the figure that compares methods."""

    metric: str
    main_score: str


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
    splits: dict[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )


TASKS = {
    "summarization": Task("rouge", "rougeLsum"),
    "translation": Task("bleu", "bleu"),
    "question_answering": Task("squad", "f1"),
}

DATASETS = {
    "debian_de_en": DatasetRecord(
        "translation", "translation", "translation", folder=DATA_FOLDER / "debian" / "debian_de_en",
        languages=("de", "en"),
    ),
    "debian_synopsis": DatasetRecord(
        "summarization", "document", "summary", folder=DATA_FOLDER / "debian" / "debian_synopsis",
        prefix="summarize: ",
    ),
}  # fmt: skip
