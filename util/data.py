"""From rows to batches: load a split, name its columns, tokenize it.

`load_examples(record, data_args, split)` gives rows with the columns id, source, target; `tokenize` turns
them into model inputs for training or evaluation.
"""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from models.errors import UserError
from util.arguments import DataArguments
from util.tasks import DATASETS, DatasetRecord

logger = logging.getLogger(__name__)

FILE_FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
SPLIT_FILES = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
DEFAULT_COLUMNS = {
    "summarization": ("document", "summary"),
    "translation": ("translation", "translation"),
    "question_answering": ("question", "answers"),
}
SEEN_COLUMN = "seen_in_train"


def dataset_record(data_args: DataArguments) -> DatasetRecord:
    """The record that the flags describe: a known data set, a hub id or local files, with overrides.

    Raises:
        UserError: the data set belongs to another task.
    """
    columns = DEFAULT_COLUMNS[data_args.task]
    hub = DatasetRecord(data_args.task, *columns, hub_id=data_args.dataset_name)
    record = DATASETS.get(data_args.dataset_name, hub)
    if record.task != data_args.task:
        raise UserError(f"--dataset_name {data_args.dataset_name} is for --task {record.task}.")
    known = record.languages or (None, None)
    languages = (data_args.source_lang or known[0], data_args.target_lang or known[1])
    overrides = {
        "source": data_args.source_column,
        "target": data_args.target_column,
        "prefix": data_args.source_prefix,
        "config": data_args.dataset_config_name,
        "revision": data_args.dataset_revision,
        "languages": languages if any(languages) else None,
    }
    return replace(record, **{name: value for name, value in overrides.items() if value is not None})


def load_examples(
    record: DatasetRecord,
    data_args: DataArguments,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_samples: int | None = None,
) -> Dataset:
    """Rows of a split as columns id (str), source, target and, where the data set knows it, seen_in_train.

    The tokenizer is needed for --drop_long_samples.

    Raises:
        UserError: there is no such split, file, column or language, or a row cannot be read.
    """
    rows, origin = load_rows(record, data_args, split)
    if len(rows) == 0:
        raise UserError(f"{origin}: the {split} split is empty.")
    check_columns(rows, record, origin)
    if max_samples is not None and not data_args.drop_long_samples:
        rows = rows.select(range(min(max_samples, len(rows))))
    reader = RowReader(record)
    examples = rows.map(
        reader, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
    )
    kept = examples.filter(lambda row: bool(row["source"].strip() and row["target"].strip()))
    if len(kept) < len(examples):
        logger.warning("%s: skipped %d rows without text.", origin, len(examples) - len(kept))
    if len(kept) == 0:
        raise UserError(f"{origin}: no row of the {split} split has both a source and a target.")
    if data_args.drop_long_samples and tokenizer is not None:
        kept = drop_long(kept, tokenizer, data_args)
    return kept if max_samples is None else kept.select(range(min(max_samples, len(kept))))


def drop_long(examples: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Dataset:
    """Rows that fit --max_source_length and --max_target_length; those that do not are counted."""

    def fits(batch: dict[str, list[str]]) -> list[bool]:
        sources, targets = tokenizer(batch["source"]).input_ids, tokenizer(batch["target"]).input_ids
        return [
            len(source) <= data_args.max_source_length and len(target) <= data_args.max_target_length
            for source, target in zip(sources, targets, strict=True)
        ]

    kept = examples.filter(fits, batched=True, desc="Dropping long rows")
    logger.info("Dropped %d of %d rows as too long.", len(examples) - len(kept), len(examples))
    if len(kept) == 0:
        raise UserError("--drop_long_samples leaves no row: raise --max_source_length, --max_target_length.")
    return kept


def load_rows(record: DatasetRecord, data_args: DataArguments, split: str) -> tuple[Dataset, str]:
    """Raw rows of a split and a name for error messages; a local file wins over the data set's own."""
    local = getattr(data_args, SPLIT_FILES[split])
    if local is None and record.folder is not None:
        local = record.folder / f"{split}.jsonl.gz"
    if local is not None:
        return load_file(Path(local)), str(local)
    if record.hub_id is None:
        raise UserError(f"There is no {split} split: give --{SPLIT_FILES[split]} or --dataset_name.")
    origin = f"{record.hub_id} [{split}]"
    hub = {"revision": record.revision} | data_args.hub
    try:
        return load_dataset(record.hub_id, record.config, split=record.splits[split], **hub), origin
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--dataset_name {origin} cannot be loaded: {reason}") from error


def load_file(path: Path) -> Dataset:
    """Rows of a local .json/.jsonl/.csv/.parquet file, gzipped or not."""
    suffix = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if suffix not in FILE_FORMATS:
        raise UserError(f"{path}: unknown format; use one of .{', .'.join(FILE_FORMATS)} (also .gz).")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        return load_dataset(FILE_FORMATS[suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError, StopIteration) as error:  # the last: no rows
        if FILE_FORMATS[suffix] == "json":
            raise UserError(describe_bad_json(path)) from error
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def describe_bad_json(path: Path) -> str:
    """Where a JSON-lines file breaks: file and line number."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    json.loads(line)
                except json.JSONDecodeError as error:
                    return f"{path}, line {number}: not JSON ({error.msg})."
    except (UnicodeDecodeError, OSError) as error:
        return f"{path}: cannot be read as UTF-8 text ({error})."
    return f"{path}: {'the rows do not share one set of columns and types' if number else 'is empty'}."


def check_columns(rows: Dataset, record: DatasetRecord, origin: str) -> None:
    """Raise UserError if a column or language that the record names is missing."""
    found = ", ".join(rows.column_names)
    for flag, column in (("--source_column", record.source), ("--target_column", record.target)):
        if column not in rows.column_names:
            raise UserError(f"{origin}: no column {column!r}; found {found}. Name yours with {flag}.")
    if record.task == "question_answering" and "context" not in rows.column_names:
        raise UserError(f"{origin}: no column 'context'; found {found}. Rename yours to it.")
    if record.task == "translation" and record.source == record.target:
        languages = record.languages or (None, None)
        for flag, language in zip(("--source_lang", "--target_lang"), languages, strict=True):
            known = sorted(rows[0][record.source])
            if language not in known:
                raise UserError(
                    f"{origin}: no language {language!r} in {record.source!r}; found {known}. Use {flag}."
                )


class RowReader:
    """Turns a raw row into id, source and target; picklable, so that `Dataset.map` can fingerprint it."""

    def __init__(self, record: DatasetRecord) -> None:
        self.record = record

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        record = self.record
        try:
            source, target = self._texts(row)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"Row {index} has an unexpected form: {error!r}.") from error
        example = {
            "id": str(row.get("id", index)),
            "source": record.prefix + as_text(source),
            "target": as_text(target),
        }
        return example | ({SEEN_COLUMN: bool(row[SEEN_COLUMN])} if SEEN_COLUMN in row else {})

    def _texts(self, row: dict[str, Any]) -> tuple[Any, Any]:
        record = self.record
        source, target = row[record.source], row[record.target]
        if record.task == "question_answering":
            answers = target["text"] if isinstance(target, dict) else target
            answers = answers if isinstance(answers, list) else [answers]
            return f"question: {source} context: {row['context']}", next(iter(answers), None)
        if record.languages and record.source == record.target:
            return source[record.languages[0]], target[record.languages[1]]
        return source, target


def as_text(value: Any) -> str:
    return "" if value is None else str(value)


def tokenize(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, max_target_length: int
) -> Dataset:
    """Columns input_ids, attention_mask, labels: lists of token ids, cut to the given lengths."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["source"], max_length=data_args.max_source_length, truncation=True)
        targets = tokenizer(text_target=batch["target"], max_length=max_target_length, truncation=True)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": targets["input_ids"],
        }

    return examples.map(
        encode,
        batched=True,
        remove_columns=examples.column_names,
        num_proc=data_args.preprocessing_num_workers,
        desc="Tokenizing",
    )
