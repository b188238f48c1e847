"""From raw rows to examples: the columns id, source and target as texts, and why a row cannot be used."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from models.errors import UserError
from util.data.sources import Row, RowFile, columns_of
from util.files import file_hash
from util.tasks import DatasetRecord

SEEN_COLUMN = "seen_in_train"
QUESTION = "question: {question} context: {context}"
TEXT_TYPES = (str, int, float, Decimal, datetime.date, datetime.time)
QUESTION_PARTS = ("source", "target", "question", "context", "references")


def check_columns(first: list[Row], record: DatasetRecord, origin: str, by_language: bool = True) -> None:
    """Raise UserError if a column or language that the record names is in none of the first rows.
    `by_language`: one column for source and target holds both by their languages."""
    columns = columns_of(first)
    found = ", ".join(columns)
    for flag, column in (("--source_column", record.source), ("--target_column", record.target)):
        if column not in columns:
            raise UserError(
                f"{origin}: no column {column!r}; found {found}. Name yours with {flag}, or the task "
                f"with --task (here {record.task})."
            )
    if record.task == "question_answering" and "context" not in columns:
        raise UserError(f"{origin}: no column 'context'; found {found}. Rename yours to it.")
    if record.task == "translation" and record.source == record.target and by_language:
        check_languages(first, record, origin)


def check_languages(first: list[Row], record: DatasetRecord, origin: str) -> None:
    texts = [row[record.source] for row in first if isinstance(row.get(record.source), dict)]
    if not texts:
        raise UserError(
            f"{origin}: {record.source!r} does not hold a text for each language; name the columns of "
            "sources and targets with --source_column and --target_column."
        )
    known = sorted(columns_of(texts))
    languages = record.languages or (None, None)
    for flag, language in zip(("--source_lang", "--target_lang"), languages, strict=True):
        if language not in known:
            raise UserError(
                f"{origin}: no language {language!r} in {record.source!r}; found {known}. Use {flag}."
            )


def read_examples(rows: RowFile | Dataset, reader: RowReader, limit: int | None) -> Dataset:
    """Examples of the first `limit` rows, with the reason where one cannot be used.

    Those of files are kept on disk, for large ones, under what the files and this code hold.
    """
    if isinstance(rows, Dataset):
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        options = {"remove_columns": rows.column_names, "features": reader.features}
        return rows.map(reader, with_indices=True, load_from_cache_file=False, **options)
    content = [file_hash(path) for path in (*rows.paths, *CODE)]
    source = {"rows": rows, "reader": reader, "limit": limit, "content": tuple(content)}
    try:
        return Dataset.from_generator(generate_examples, features=reader.features, gen_kwargs=source)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise


def generate_examples(
    rows: RowFile, reader: RowReader, limit: int | None, content: tuple[str, ...]
) -> Iterator[Row]:
    """`content` is not read: it is there to be part of the cache's key."""
    for index, row in enumerate(islice(rows, limit)):
        yield reader(row, index)


class RowReader:
    """Turns a raw row into id, source and target; picklable, so that `datasets` can fingerprint it."""

    def __init__(self, record: DatasetRecord, columns: list[str]) -> None:
        self.record = record
        self.knows_seen = SEEN_COLUMN in columns

    @property
    def features(self) -> Features:
        """Types of the columns."""
        types = dict.fromkeys(("id", *self._columns(), "problem"), Value("string"))
        types |= {"references": List(Value("string"))} if "references" in types else {}
        return Features(types | ({SEEN_COLUMN: Value("bool")} if self.knows_seen else {}))

    def __call__(self, row: Row, index: int) -> Row:
        """Columns id, source, target and problem, which is empty where the row can be used."""
        name = str(index) if is_empty(row.get("id")) else as_text(row["id"])
        try:
            example = self._read(row)
            problem = find_problem(example)
        except (TypeError, KeyError, AttributeError) as error:
            example, problem = dict.fromkeys(self._columns()), f"unexpected form: {error!r}"
        if problem:
            example = {column: [] if column == "references" else "" for column in self._columns()}
        example = {
            column: [as_text(item) for item in value] if isinstance(value, list) else as_text(value)
            for column, value in example.items()
        }
        if self.knows_seen:
            example[SEEN_COLUMN] = as_text(row.get(SEEN_COLUMN)).lower() in ("true", "1")
        return {"id": escape(name), **example, "problem": problem}

    def _columns(self) -> tuple[str, ...]:
        return QUESTION_PARTS if self.record.task == "question_answering" else ("source", "target")

    def _read(self, row: Row) -> Row:
        record = self.record
        source: Any = row.get(record.source)
        target: Any = row.get(record.target)
        if record.task == "question_answering":
            answers = list_answers(target)
            parts = {"question": strip_left(source), "context": strip_left(row.get("context"))}
            whole = record.prefix + QUESTION.format(**{name: as_text(part) for name, part in parts.items()})
            return {**parts, "source": whole, "target": next(iter(answers), None), "references": answers}
        if record.languages and record.source == record.target:
            source, target = source.get(record.languages[0]), target.get(record.languages[1])
        return {"source": with_prefix(record.prefix, source), "target": target}


def strip_left(text: Any) -> Any:
    """Text without leading blanks, as the original's questions and contexts; other values as they are."""
    return text.lstrip() if isinstance(text, str) else text


def list_answers(target: Any) -> list[Any]:
    """All right answers of a question, those that are empty left out."""
    answers = target["text"] if isinstance(target, dict) else target
    answers = answers if isinstance(answers, list) else [answers]
    texts = [answer["text"] if isinstance(answer, dict) else answer for answer in answers]
    return [text for text in texts if not is_empty(text)]


def with_prefix(prefix: str, text: Any) -> Any:
    """Prefixed text; what holds no text stays as it is, to be found by `find_problem`."""
    return prefix + as_text(text) if isinstance(text, TEXT_TYPES) and not is_empty(text) else text


def find_problem(example: Row) -> str:
    """Why a row cannot be used; empty if it can. Numbers, dates and truth values count as text."""
    if example.get("references") == []:
        return "no answer: questions that their context does not answer are left out"
    for column in ("question", "context", "source", "target", "references"):
        value = example.get(column, "-")
        for item in value if isinstance(value, list) else [value]:
            if is_empty(item):
                return f"empty {column}"
            if not isinstance(item, TEXT_TYPES):
                return f"{column} is of type {type(item).__name__}, not text"
            if escape(as_text(item)) != as_text(item):
                return f"{column} holds half a character, which UTF-8 cannot write"
    return ""


def is_empty(value: Any) -> bool:
    """Whether there is no text: None, blanks, or the NaN that stands for a gap in a column of numbers."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def as_text(value: Any) -> str:
    """The text of a value; truth values as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def escape(text: str) -> str:
    """Text with halves of surrogate pairs, which JSON can write and UTF-8 cannot, written out."""
    return text.encode("utf8", "backslashreplace").decode("utf8")


CODE = tuple(Path(__file__).with_name(name) for name in ("rows.py", "sources.py"))
