"""Training rows read as they are needed: `stream_training_rows(record, data_args, tokenizer, seed)`.

Nothing is known of the whole stream, so what is wrong with rows is counted, and listed, while they pass by.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from models.errors import UserError
from models.prompts import Prompt
from util.data.encoding import make_encoder
from util.data.examples import (
    NO_WINDOW,
    QUESTION_COLUMNS,
    ContextSplitter,
    skipped_entry,
    skipped_rows_file,
    with_prefix_for,
)
from util.data.rows import RowReader, check_columns
from util.data.sources import READ_ERRORS, Row, Rows, columns_of, load_rows, peek
from util.data_arguments import DataArguments
from util.files import json_line
from util.tasks import DatasetRecord

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000


def stream_training_rows(
    record: DatasetRecord,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    prompt: Prompt | None = None,
) -> IterableDataset:
    """Tokenized training rows, read, shuffled and encoded as they are needed.

    Rows that cannot be used are listed in skipped_rows.train.jsonl as they are met.

    Raises:
        UserError: there is no such file or column, or no row; while the stream is read: it breaks off, or
            none of its rows can be used.
    """
    if data_args.drop_long_samples:
        raise UserError("--drop_long_samples needs all rows at once: leave --streaming out.")
    rows, origin = load_rows(record, data_args, "train", streaming=True)
    first = peek(read_rows(rows, origin))
    if not first:
        raise UserError(f"{origin}: the train split is empty.")
    check_columns(first, record, origin)
    record = with_prefix_for(record, data_args, tokenizer, prompt)
    reader = RowReader(record, columns_of(first))
    splitter, columns = None, [name for name in reader.features if name != "problem"]
    if record.task == "question_answering":
        splitter = ContextSplitter(record, data_args, "train", make_encoder(tokenizer, prompt))
        columns = list(QUESTION_COLUMNS)
    stream = {
        "rows": rows,
        "limit": data_args.max_train_samples,
        "reader": reader,
        "skipped": SkippedRows(origin, skipped_rows_file(data_args, "train")),
        "splitter": splitter,
    }
    examples = IterableDataset.from_generator(usable_examples, gen_kwargs=stream)
    lengths = (data_args.max_source_length, data_args.max_target_length)
    say_cut = partial(Tally().add, "A source is cut to --max_source_length %d", data_args.max_source_length)
    encode = make_encoder(tokenizer, prompt, *lengths, on_cut=say_cut)
    encoded = examples.map(encode, batched=True, remove_columns=columns)
    return encoded.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def read_rows(rows: Rows, origin: str) -> Iterator[Row]:
    """The rows; data that cannot be read, from its start or further on, is a UserError that says where."""
    try:
        yield from rows
    except UserError:
        raise
    except READ_ERRORS as error:
        raise UserError(f"{origin}: {' '.join(str(error.__cause__ or error).split())}") from error


def usable_examples(
    rows: Rows,
    limit: int | None,
    reader: RowReader,
    skipped: SkippedRows,
    splitter: ContextSplitter | None = None,
) -> Iterator[Row]:
    """Examples of one pass over the first rows that can be used, or of their windows; the others are handed
    to `skipped`."""
    total, bad = 0, 0
    for total, row in enumerate(islice(read_rows(rows, skipped.origin), limit), 1):
        example = reader(row, total - 1)
        problem = example.pop("problem")
        found = [] if problem else [example] if splitter is None else splitter(example)
        if not found:
            bad += 1
            skipped.add(total - 1, example["id"], problem or NO_WINDOW)
        yield from found
    if bad == total:
        raise UserError(f"{skipped.origin}: none of {bad} rows can be used; {skipped.first}.")
    if bad:
        logger.warning("%s: skipped %d of %d rows (%s).", skipped.origin, bad, total, skipped.place)


class Tally:
    """A count that is logged at 1, 10, 100, ...: a stream has no end to wait for."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, message: str, *values: Any) -> None:
        self.count += 1
        if str(self.count).rstrip("0") == "1":
            logger.warning(message + " (%d so far)", *values, self.count)


class SkippedRows:
    """Lists the rows that cannot be used, each once, however often the stream passes."""

    def __init__(self, origin: str, path: Path | None) -> None:
        self.origin = origin
        self.path = path
        self.place = "not listed" if path is None else f"listed in {path}"
        self.first = ""
        if path is not None:
            path.unlink(missing_ok=True)  # of an earlier run
        self.seen: set[int] = set()
        self.tally = Tally()

    def add(self, row: int, name: str, problem: str) -> None:
        if row in self.seen:
            return
        self.first = self.first or f"row {row}: {problem}"
        if self.path is not None:
            with self.path.open("a", encoding="utf8") as file:
                file.write(json_line(skipped_entry(self.origin, row, name, problem)))
        self.seen.add(row)
        self.tally.add("%s: row %d is skipped: %s (%s)", self.origin, row, problem, self.place)
