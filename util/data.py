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

import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from pandas.errors import EmptyDataError
from transformers import PreTrainedTokenizerBase

from models.errors import UserError
from util.arguments import DataArguments
from util.tasks import DATASETS, PARQUET, DatasetRecord

logger = logging.getLogger(__name__)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our errors name file and line

FILE_FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
SPLIT_FILES = {"train": "train_file", "validation": "validation_file", "test": "test_file"}
DEFAULT_COLUMNS = {
    "summarization": ("document", "summary"),
    "translation": ("translation", "translation"),
    "question_answering": ("question", "answers"),
}
SEEN_COLUMN = "seen_in_train"
QUESTION = "question: {question} context: {context}"
QUESTION_COLUMNS = ("id", "window", "source", "target", "references")
READ_ERRORS = (DatasetGenerationError, ValueError, OSError, StopIteration)  # the last: no rows


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
    """Rows of a split as columns id (str), source, target; seen_in_train where the data set knows it.

    Question answering has the columns references (all right answers) and window as well: contexts too long
    for --max_source_length become several rows of one id. The tokenizer is needed for that and for
    --drop_long_samples. Rows that cannot be used are counted, and listed in skipped_rows.jsonl.

    Raises:
        UserError: there is no such split, file, column or language, or no row can be used.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"The number of samples must be positive, got {max_samples}.")
    rows, origin = load_rows(record, data_args, split)
    if len(rows) == 0:
        raise UserError(f"{origin}: the {split} split is empty.")
    check_columns(rows.column_names, rows[0], record, origin)
    if max_samples is not None and not data_args.drop_long_samples:
        rows = rows.select(range(min(max_samples, len(rows))))
    reader = RowReader(record)
    examples = rows.map(
        reader, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
    )
    kept = number_repeated_ids(skip_bad_rows(examples, origin, split, data_args), origin)
    if data_args.drop_long_samples and tokenizer is not None:
        kept = drop_long(kept, tokenizer, data_args)
    kept = kept if max_samples is None else kept.select(range(min(max_samples, len(kept))))
    if record.task == "question_answering":
        return split_contexts(kept, kept.column_names, record, data_args, split, tokenizer)
    return kept


def skip_bad_rows(examples: Dataset, origin: str, split: str, data_args: DataArguments) -> Dataset:
    """Rows that can be used; the others are counted in a warning and listed with their reasons."""
    problems = examples["problem"]
    bad = [row for row, problem in enumerate(problems) if problem]
    examples = examples.remove_columns("problem")
    path, place = skipped_rows_file(data_args, split), "not listed"
    if not bad:
        if path is not None:
            path.unlink(missing_ok=True)  # of an earlier run
        return examples
    if len(bad) == len(problems):
        raise UserError(f"{origin}: none of {len(bad)} rows can be used; row 0: {problems[0]}.")
    if path is not None:
        with path.open("w", encoding="utf8") as file:
            file.writelines(skipped_entry(origin, row, examples[row]["id"], problems[row]) for row in bad)
        place = f"listed in {path}"
    logger.warning("%s: skipped %d of %d rows (%s).", origin, len(bad), len(problems), place)
    return examples.select(sorted(set(range(len(problems))) - set(bad)))


def skipped_rows_file(data_args: DataArguments, split: str) -> Path | None:
    return None if data_args.report_dir is None else Path(data_args.report_dir, f"skipped_rows.{split}.jsonl")


def skipped_entry(origin: str, row: int, name: str, problem: str) -> str:
    """One line of skipped_rows.<split>.jsonl."""
    entry = {"origin": origin, "row": row, "id": name, "reason": problem}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def number_repeated_ids(examples: Dataset, origin: str) -> Dataset:
    """Row numbers instead of ids that are not unique."""
    first_rows: dict[str, int] = {}
    for row, name in enumerate(examples["id"]):
        if first_rows.setdefault(name, row) != row:
            first = first_rows[name]
            logger.warning("%s: rows %d and %d share the id %r; using row numbers.", origin, first, row, name)
            numbers = [str(number) for number in range(len(examples))]
            return examples.remove_columns("id").add_column("id", numbers)
    return examples


def split_contexts(
    examples: Dataset | IterableDataset,
    columns: list[str],
    record: DatasetRecord,
    data_args: DataArguments,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Dataset | IterableDataset:
    """One row for each window of a question's context, with other `columns`; for training, only windows that
    hold the answer."""

    def windows(row: dict[str, Any]) -> list[str]:
        if tokenizer is None:
            return [row["context"]]
        question = record.prefix + QUESTION.format(question=row["question"], context="")
        room = data_args.max_source_length - len(tokenizer(question).input_ids) - 1
        if room <= data_args.doc_stride:
            raise UserError(
                f"Question {row['id']} leaves {room} tokens for its context: raise --max_source_length or "
                "lower --doc_stride."
            )
        return split_text(row["context"], tokenizer, room, data_args.doc_stride)

    def expand(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        expanded = [
            {
                "id": row["id"],
                "window": index,
                "source": record.prefix + QUESTION.format(question=row["question"], context=text),
                "target": row["target"],
                "references": row["references"],
            }
            for row in rows
            for index, text in enumerate(windows(row))
            if split != "train" or any(answer in text for answer in row["references"])
        ]
        return {name: [row[name] for row in expanded] for name in QUESTION_COLUMNS}

    return examples.map(expand, batched=True, remove_columns=columns)


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int, stride: int) -> list[str]:
    """Pieces of at most `length` tokens, neighbours sharing `stride` of them."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= length:
        return [text]
    starts = range(0, len(offsets) - stride, length - stride)
    return [text[offsets[start][0] : offsets[min(start + length, len(offsets)) - 1][1]] for start in starts]


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


def load_rows(
    record: DatasetRecord, data_args: DataArguments, split: str, streaming: bool = False
) -> tuple[Dataset | IterableDataset, str]:
    """Raw rows of a split and a name for error messages; a local file wins over the data set's own."""
    local = getattr(data_args, SPLIT_FILES[split])
    if local is None and data_args.data_dir is not None:
        local = find_split_file(Path(data_args.data_dir), data_args.dataset_name, split)
        if local is None and record.folder is None:
            raise UserError(
                f"--data_dir {data_args.data_dir} has no {split} split: no file like "
                f"{data_args.dataset_name or 'data set'}.{split}.json(l), .csv or .parquet (also .gz)."
            )
    if local is None and record.folder is not None:  # embedded rows
        local = record.folder / f"{split}.jsonl.gz"
    if local is not None:
        return load_file(Path(local), streaming), str(local)
    if record.hub_id is None:
        raise UserError(f"There is no {split} split: give --{SPLIT_FILES[split]} or --dataset_name.")
    origin = f"{record.hub_id} [{split}]"
    hub = {"revision": record.revision, "streaming": streaming} | data_args.hub
    # The branch of converted files has a folder for each configuration, and no card that names them.
    config = {"data_dir" if record.revision == PARQUET else "name": record.config}
    try:
        return load_dataset(record.hub_id, split=record.splits[split], **config, **hub), origin
    except READ_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--dataset_name {origin} cannot be loaded: {reason}") from error


def find_split_file(folder: Path, dataset_name: str | None, split: str) -> Path | None:
    """`<split>.<format>` or `<data set>.<split>.<format>` in a folder, gzipped or not."""
    stems = [split] if dataset_name is None else [f"{dataset_name}.{split}", split]
    names = [
        f"{stem}.{suffix}{zipped}" for stem in stems for suffix in FILE_FORMATS for zipped in ("", ".gz")
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_file(path: Path, streaming: bool = False) -> Dataset | IterableDataset:
    """Rows of a local .json/.jsonl/.csv/.parquet file, gzipped or not."""
    if file_format(path) is None:
        raise UserError(f"{path}: unknown format; use one of .{', .'.join(FILE_FORMATS)} (also .gz).")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        if path.name.endswith(".parquet.gz"):  # the loader decompresses the text formats alone
            with gzip.open(path) as file:
                rows = Dataset(pq.read_table(file))
            return rows.to_iterable_dataset() if streaming else rows
        rows = load_dataset(file_format(path), data_files=str(path), split="train", streaming=streaming)
        if not streaming:
            rows.data.table.validate(full=True)  # of JSON, the loader takes text that is not UTF-8
        return rows
    except READ_ERRORS as error:
        raise UserError(describe_read_error(str(path), error)) from error


def describe_read_error(origin: str, error: Exception) -> str:
    """What is wrong with a file, in one line; `origin` is its path, or names a data set of the hub."""
    path = Path(origin)
    if path.is_file() and file_format(path) == "json":
        return describe_bad_json(path)
    reason = error.__cause__ or error
    if isinstance(reason, UnicodeDecodeError):
        return f"{origin}: cannot be read as UTF-8 text ({reason})."
    if isinstance(reason, EmptyDataError) or "corresponds to no data" in str(reason):
        return f"{origin}: is empty."
    return f"{origin}: {' '.join(str(reason).split())}"


def file_format(path: Path) -> str | None:
    """The loader for a file's name, gzipped or not, if there is one."""
    return FILE_FORMATS.get(path.name.removesuffix(".gz").rsplit(".", 1)[-1])


def describe_bad_json(path: Path) -> str:
    """Where a JSON-lines file breaks: file and line number."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for line in lines:
                number += 1
                json.loads(line.decode("utf8"))
    except UnicodeDecodeError as error:
        return f"{path}, line {number}: not UTF-8 text ({error})."
    except json.JSONDecodeError as error:
        return f"{path}, line {number}: not JSON ({error.msg})."
    except OSError as error:
        return f"{path}: cannot be read ({error})."
    return f"{path}: {'the rows do not share one set of columns and types' if number else 'is empty'}."


def check_columns(columns: list[str], first: dict[str, Any], record: DatasetRecord, origin: str) -> None:
    """Raise UserError if a column or language that the record names is missing."""
    found = ", ".join(columns)
    for flag, column in (("--source_column", record.source), ("--target_column", record.target)):
        if column not in columns:
            raise UserError(
                f"{origin}: no column {column!r}; found {found}. Name yours with {flag}, or the task with "
                f"--task (here {record.task})."
            )
    if record.task == "question_answering" and "context" not in columns:
        raise UserError(f"{origin}: no column 'context'; found {found}. Rename yours to it.")
    if record.task == "translation" and record.source == record.target:
        languages = record.languages or (None, None)
        for flag, language in zip(("--source_lang", "--target_lang"), languages, strict=True):
            known = sorted(first[record.source])
            if language not in known:
                raise UserError(
                    f"{origin}: no language {language!r} in {record.source!r}; found {known}. Use {flag}."
                )


class RowReader:
    """Turns a raw row into id, source and target; picklable, so that `Dataset.map` can fingerprint it."""

    def __init__(self, record: DatasetRecord) -> None:
        self.record = record

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Columns id, source, target and problem, which is empty where the row can be used."""
        name = str(index if row.get("id") is None else row["id"])
        try:
            example = self._read(row)
            problem = find_problem(example)
        except (TypeError, KeyError, AttributeError) as error:
            example, problem = dict.fromkeys(self._columns()), f"unexpected form: {error!r}"
        if problem:  # columns need one type
            example = {column: [] if column == "references" else "" for column in self._columns()}
        example = {column: as_text(value) for column, value in example.items()}
        seen = {SEEN_COLUMN: bool(row[SEEN_COLUMN])} if SEEN_COLUMN in row else {}
        return {"id": name, **example, "problem": problem} | seen

    def _columns(self) -> tuple[str, ...]:
        if self.record.task == "question_answering":
            return ("source", "target", "question", "context", "references")
        return ("source", "target")

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        record = self.record
        source, target = row[record.source], row[record.target]
        if record.task == "question_answering":
            answers = target["text"] if isinstance(target, dict) else target
            answers = answers if isinstance(answers, list) else [answers]
            parts = {"question": source, "context": row["context"]}
            whole = record.prefix + QUESTION.format(**parts)
            return {"source": whole, "target": next(iter(answers), None), **parts, "references": answers}
        if record.languages and record.source == record.target:
            source, target = source[record.languages[0]], target[record.languages[1]]
        return {"source": with_prefix(record.prefix, source), "target": target}


def with_prefix(prefix: str, text: Any) -> Any:
    """Prefixed text; what holds no text stays as it is, to be found by `find_problem`."""
    return prefix + as_text(text) if isinstance(text, (str, int, float)) and str(text).strip() else text


def find_problem(example: dict[str, Any]) -> str:
    """Why a row cannot be used; empty if it can. Numbers, as CSV readers make them, count as text."""
    for column in ("question", "context", "source", "target"):
        if column not in example:
            continue
        value = example[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            return f"empty {column}"
        if not isinstance(value, (str, int, float)):
            return f"{column} is of type {type(value).__name__}, not text"
    return ""


def as_text(value: Any) -> str | list[str]:
    return [str(item) for item in value] if isinstance(value, list) else str(value)


class Encoder:
    """Maps a batch of sources and targets to token ids of at most the given lengths; picklable."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_source_length: int, max_target_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = self.tokenizer(batch["source"], max_length=self.max_source_length, truncation=True)
        targets = self.tokenizer(
            text_target=batch["target"], max_length=self.max_target_length, truncation=True
        )
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": targets["input_ids"],
        }


def tokenize(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, max_target_length: int
) -> Dataset:
    """Columns input_ids, attention_mask, labels: lists of token ids, cut to the given lengths."""
    cut = count_long_sources(examples, tokenizer, data_args.max_source_length)
    if cut:
        limit = data_args.max_source_length
        logger.warning("%d of %d sources are cut to --max_source_length %d.", cut, len(examples), limit)
    return examples.map(
        Encoder(tokenizer, data_args.max_source_length, max_target_length),
        batched=True,
        remove_columns=examples.column_names,
        num_proc=data_args.preprocessing_num_workers,
        desc="Tokenizing",
    )


def count_long_sources(examples: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
    """How many sources have more than `limit` tokens."""
    encoded = tokenizer(list(examples["source"]), verbose=False).input_ids
    return sum(len(token_ids) > limit for token_ids in encoded)
