"""From rows to batches: load a split, name its columns, tokenize it.

`load_examples(record, data_args, split)` gives rows with the columns id, source, target; `tokenize` turns
them into model inputs for training or evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from models.errors import UserError
from models.languages import mark_target
from models.prompts import Prompt
from util.data.encoding import Encoder, make_encoder
from util.data.rows import QUESTION, RowReader, check_columns, read_examples
from util.data.sources import Row, columns_of, load_rows, peek
from util.data.sources import load_file as load_file  # read from here by gpt_eval
from util.data.windows import split_text
from util.data_arguments import DataArguments
from util.files import read_json_lines, write_json_lines
from util.tasks import DATASETS, DatasetRecord

logger = logging.getLogger(__name__)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our errors name file and line

DEFAULT_COLUMNS = {
    "summarization": ("document", "summary"),
    "translation": ("translation", "translation"),
    "question_answering": ("question", "answers"),
}
QUESTION_COLUMNS = ("id", "window", "source", "target", "references")
NO_WINDOW = (
    "its context is longer than --max_source_length, and no part of it holds an answer as it is written"
)


def dataset_record(data_args: DataArguments) -> DatasetRecord:
    """The record that the flags describe: a known data set, a hub id or local files, with overrides.

    Raises:
        UserError: the data set belongs to another task.
    """
    columns = DEFAULT_COLUMNS[data_args.task]
    hub = DatasetRecord(data_args.task, *columns, hub_id=data_args.dataset_name)
    record = DATASETS.get(data_args.dataset_name or "", hub)
    if record.task != data_args.task:
        raise UserError(f"--dataset_name {data_args.dataset_name} is for --task {record.task}.")
    known = record.languages or (None, None)
    languages = (data_args.source_lang or known[0], data_args.target_lang or known[1])
    overrides: dict[str, Any] = {
        "source": data_args.source_column,
        "target": data_args.target_column,
        "prefix": data_args.source_prefix,
        "config": data_args.dataset_config_name,
        "revision": data_args.dataset_revision,
        "languages": languages if any(languages) else None,
    }
    return replace(record, **{name: value for name, value in overrides.items() if value is not None})


def target_language(data_args: DataArguments) -> str | None:
    """What targets are written in, if the flags or the data set say."""
    return (dataset_record(data_args).languages or (None, None))[1]


def with_prefix_for(
    record: DatasetRecord,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt | None,
) -> DatasetRecord:
    """The record with a model's own prefix of sources: one by which a multilingual Marian is told the target
    language; where a prompt says what is asked for, none but the flag's."""
    if prompt is not None:
        return replace(record, prefix=data_args.source_prefix or "")
    target = (record.languages or (None, None))[1]
    return replace(record, prefix=mark_target(tokenizer, target, record.prefix))


def load_examples(
    record: DatasetRecord,
    data_args: DataArguments,
    split: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_samples: int | None = None,
    prompt: Prompt | None = None,
) -> Dataset:
    """Rows of a split as columns id (str), source, target; seen_in_train where the data set knows it.

    Question answering has the columns references (all right answers) and window as well: contexts too long
    for --max_source_length become several rows of one id. The tokenizer is needed for that and for
    --drop_long_samples. Rows that cannot be used are counted, and listed in skipped_rows.<split>.jsonl.

    Raises:
        UserError: there is no such split, file, column or language, or no row can be used.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"The number of samples must be positive, got {max_samples}.")
    rows, origin = load_rows(record, data_args, split)
    first = peek(rows)
    if not first:
        raise UserError(f"{origin}: the {split} split is empty.")
    bare = data_args.sources_alone and record.target not in columns_of(first)
    if bare:  # sources stand for targets
        record = replace(record, target=record.source, languages=None)
    check_columns(first, record, origin, by_language=not bare)
    limit = None if data_args.drop_long_samples else max_samples
    record = with_prefix_for(record, data_args, tokenizer, prompt)
    examples = read_examples(rows, RowReader(record, columns_of(first)), limit)
    examples = number_repeated_ids(examples, origin)
    path = skipped_rows_file(data_args, split)
    kept = skip_bad_rows(examples, origin, path)
    encoder = None if tokenizer is None else make_encoder(tokenizer, prompt)
    if data_args.drop_long_samples and encoder is not None:
        kept = drop_long(kept, encoder, data_args)
    kept = kept if max_samples is None else kept.select(range(min(max_samples, len(kept))))
    if record.task == "question_answering":
        splitter = ContextSplitter(record, data_args, split, encoder)
        windows = kept.map(splitter.split_batch, batched=True, remove_columns=kept.column_names)
        list_unanswered(kept, windows, examples, origin, path)
        return windows
    return kept


def skip_bad_rows(examples: Dataset, origin: str, path: Path | None) -> Dataset:
    """Rows that can be used; the others are counted in a warning and listed with their reasons."""
    problems, names = examples["problem"], examples["id"]
    bad = [row for row, problem in enumerate(problems) if problem]
    examples = examples.remove_columns("problem")
    if not bad:
        if path is not None:
            path.unlink(missing_ok=True)  # of an earlier run
        return examples
    if len(bad) == len(problems):
        raise UserError(f"{origin}: none of {len(bad)} rows can be used; row 0: {problems[0]}.")
    entries = [skipped_entry(origin, row, names[row], problems[row]) for row in bad]
    list_skipped(entries, len(problems), path)
    return examples.select(sorted(set(range(len(problems))) - set(bad)))


def list_unanswered(
    questions: Dataset, windows: Dataset, examples: Dataset, origin: str, path: Path | None
) -> None:
    """Count and list the questions that are left without a window, after the other `examples` that were
    skipped.

    Raises:
        UserError: no window is left.
    """
    answered = set(windows["id"])
    lost = [name for name in questions["id"] if name not in answered]
    if not lost:
        return
    usable = zip(examples["id"], examples["problem"], strict=True)
    rows = {name: row for row, (name, problem) in enumerate(usable) if not problem}
    if not answered:
        raise UserError(f"{origin}: none of {len(lost)} rows can be used; row {rows[lost[0]]}: {NO_WINDOW}.")
    before = [] if path is None or not path.is_file() else [entry for _, entry in read_json_lines(path)]
    entries = [skipped_entry(origin, rows[name], name, NO_WINDOW) for name in lost]
    list_skipped(entries, len(questions), path, before)


def list_skipped(
    entries: list[dict[str, Any]], total: int, path: Path | None, before: Iterable[dict[str, Any]] = ()
) -> None:
    """Count rows that are skipped in a warning and list them, after those `before`."""
    if path is not None:
        write_json_lines(path, [*before, *entries])
    place = "not listed" if path is None else f"listed in {path}"
    logger.warning("%s: skipped %d of %d rows (%s).", entries[0]["origin"], len(entries), total, place)


def skipped_rows_file(data_args: DataArguments, split: str) -> Path | None:
    return None if data_args.report_dir is None else Path(data_args.report_dir, f"skipped_rows.{split}.jsonl")


def skipped_entry(origin: str, row: int, name: str, problem: str) -> dict[str, Any]:
    """One line of skipped_rows.<split>.jsonl."""
    return {"origin": origin, "row": row, "id": name, "reason": problem}


def number_repeated_ids(examples: Dataset, origin: str) -> Dataset:
    """Row numbers, those of the file, instead of ids that are not unique among rows that can be used."""
    first_rows: dict[str, int] = {}
    for row, (name, problem) in enumerate(zip(examples["id"], examples["problem"], strict=True)):
        if not problem and first_rows.setdefault(name, row) != row:
            first = first_rows[name]
            logger.warning("%s: rows %d and %d share the id %r; using row numbers.", origin, first, row, name)
            numbers = [str(number) for number in range(len(examples))]
            return examples.remove_columns("id").add_column("id", numbers)
    return examples


class ContextSplitter:
    """Makes a row of each window of a question's context; picklable.

    For training, of several windows only those are taken that hold an answer, which is then their target. A
    whole context is taken as it is: its answer may be said in other words.
    """

    def __init__(
        self, record: DatasetRecord, data_args: DataArguments, split: str, encoder: Encoder | None
    ) -> None:
        self.prefix = record.prefix
        self.max_source_length = data_args.max_source_length
        self.doc_stride = data_args.doc_stride
        self.trains = split == "train"
        self.encoder = encoder

    def __call__(self, row: Row) -> list[Row]:
        texts = self._windows(row)
        whole = len(texts) == 1
        targets = [self._target(row, text, whole) for text in texts]
        return [
            {
                "id": row["id"],
                "window": index,
                "source": self.prefix + QUESTION.format(question=row["question"], context=text),
                "target": target,
                "references": row["references"],
            }
            for index, (text, target) in enumerate(zip(texts, targets, strict=True))
            if target is not None
        ]

    def split_batch(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        windows = [window for row in rows for window in self(row)]
        return {name: [window[name] for window in windows] for name in QUESTION_COLUMNS}

    def _windows(self, row: Row) -> list[str]:
        if self.encoder is None:
            return [row["context"]]
        question = self.prefix + QUESTION.format(question=row["question"], context="")
        room = self.max_source_length - len(self.encoder.whole_sources([question])[0]) - 1
        if room <= self.doc_stride:
            raise UserError(
                f"Question {row['id']} leaves {room} tokens for its context: raise --max_source_length or "
                "lower --doc_stride."
            )
        return split_text(row["context"], self.encoder.tokenizer, room, self.doc_stride)

    def _target(self, row: Row, text: str, whole: bool) -> str | None:
        """What is asked of a window; None if it cannot be learnt there."""
        if not self.trains:
            return row["target"]
        held = (answer for answer in row["references"] if answer in text)
        return next(held, row["target"] if whole else None)


def drop_long(examples: Dataset, encoder: Encoder, data_args: DataArguments) -> Dataset:
    """Rows that fit --max_source_length and --max_target_length; those that do not are counted."""

    def fits(batch: dict[str, list[str]]) -> list[bool]:
        sources, targets = encoder.whole_sources(batch["source"]), encoder.targets(batch)
        return [
            len(source) <= data_args.max_source_length and len(target) <= data_args.max_target_length
            for source, target in zip(sources, targets, strict=True)
        ]

    kept = examples.filter(fits, batched=True, desc="Dropping long rows")
    logger.info("Dropped %d of %d rows as too long.", len(examples) - len(kept), len(examples))
    if len(kept) == 0:
        raise UserError("--drop_long_samples leaves no row: raise --max_source_length, --max_target_length.")
    return kept


def tokenize(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    max_target_length: int,
    prompt: Prompt | None = None,
) -> Dataset:
    """Columns input_ids, attention_mask, labels: lists of token ids, cut to the given lengths."""
    encoder = make_encoder(tokenizer, prompt, data_args.max_source_length, max_target_length)
    warn_of_cuts(examples, encoder)
    return examples.map(
        encoder,
        batched=True,
        remove_columns=examples.column_names,
        num_proc=data_args.preprocessing_num_workers,
        desc="Tokenizing",
    )


def warn_of_cuts(examples: Dataset, encoder: Encoder) -> None:
    """Say how many sources and targets are longer than the encoder's limits."""
    cut, total = count_long_sources(examples, encoder), len(examples)
    if cut:
        logger.warning(
            "%d of %d sources are cut to --max_source_length %d.", cut, total, encoder.max_source_length
        )
    cut = count_longer(encoder.whole().targets(examples[:]), encoder.max_target_length)
    if cut:
        logger.warning("%d of %d targets are cut to %d tokens.", cut, total, encoder.max_target_length)


def count_long_sources(examples: Dataset, encoder: Encoder) -> int:
    """How many sources have more tokens than the encoder's limit."""
    return count_longer(encoder.whole_sources(list(examples["source"])), encoder.max_source_length)


def count_longer(rows: list[list[int]], limit: int | None) -> int:
    return 0 if limit is None else sum(len(row) > limit for row in rows)
