"""From rows to batches: load a split, name its columns, tokenize it.

`load_examples(record, data_args, split)` gives rows with the columns id, source, target; `tokenize` turns
them into model inputs for training or evaluation.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from models.errors import UserError
from models.languages import mark_target
from models.prompts import Prompt
from util.data.encoding import Encoder, make_encoder
from util.data.rows import QUESTION, RowReader, check_columns, read_examples
from util.data.sources import columns_of, load_rows, peek
from util.data.sources import load_file as load_file  # read from here by gpt_eval
from util.data.windows import split_text
from util.data_arguments import DataArguments
from util.files import write_json_lines
from util.tasks import DATASETS, DatasetRecord

logger = logging.getLogger(__name__)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # our errors name file and line

DEFAULT_COLUMNS = {
    "summarization": ("document", "summary"),
    "translation": ("translation", "translation"),
    "question_answering": ("question", "answers"),
}
QUESTION_COLUMNS = ("id", "window", "source", "target", "references")


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
    --drop_long_samples. Rows that cannot be used are counted, and listed in skipped_rows.jsonl.

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
    kept = number_repeated_ids(skip_bad_rows(examples, origin, split, data_args), origin)
    encoder = None if tokenizer is None else make_encoder(tokenizer, prompt)
    if data_args.drop_long_samples and encoder is not None:
        kept = drop_long(kept, encoder, data_args)
    kept = kept if max_samples is None else kept.select(range(min(max_samples, len(kept))))
    if record.task == "question_answering":
        return split_contexts(kept, kept.column_names, record, data_args, split, encoder)
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
        write_json_lines(
            path, (skipped_entry(origin, row, examples[row]["id"], problems[row]) for row in bad)
        )
        place = f"listed in {path}"
    logger.warning("%s: skipped %d of %d rows (%s).", origin, len(bad), len(problems), place)
    return examples.select(sorted(set(range(len(problems))) - set(bad)))


def skipped_rows_file(data_args: DataArguments, split: str) -> Path | None:
    return None if data_args.report_dir is None else Path(data_args.report_dir, f"skipped_rows.{split}.jsonl")


def skipped_entry(origin: str, row: int, name: str, problem: str) -> dict[str, Any]:
    """One line of skipped_rows.<split>.jsonl."""
    return {"origin": origin, "row": row, "id": name, "reason": problem}


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
    encoder: Encoder | None,
) -> Dataset | IterableDataset:
    """One row for each window of a question's context, with other `columns`; for training, only windows that
    hold the answer."""

    def windows(row: dict[str, Any]) -> list[str]:
        if encoder is None:
            return [row["context"]]
        question = record.prefix + QUESTION.format(question=row["question"], context="")
        room = data_args.max_source_length - len(encoder.whole_sources([question])[0]) - 1
        if room <= data_args.doc_stride:
            raise UserError(
                f"Question {row['id']} leaves {room} tokens for its context: raise --max_source_length or "
                "lower --doc_stride."
            )
        return split_text(row["context"], encoder.tokenizer, room, data_args.doc_stride)

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
