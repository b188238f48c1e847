"""answers.jsonl: each answer appended and on disk before the next step, one a request, one writer.

A line has `key` (of the request), `model` (the judge, as asked for), `answer` (text), `finish_reason`,
`usage`, `served_model`, `seconds` and `attempts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from models.errors import UserError
from models.json_files import check_fields
from util.files import JsonLog, read_json_lines

ANSWER = {"key": str, "model": str, "answer": str | None}  # what others read of a line


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by key of request; a last line that a kill cut off does not count.

    Raises:
        UserError: a whole line is not an answer, two answer the same request, or two models do.
    """
    rows = (row for _, row in read_json_lines(path)) if path.is_file() else ()
    answers = index_answers(path, rows)
    models = sorted({record["model"] for record in answers.values()})
    if len(models) > 1:
        raise UserError(f"{path} holds answers of {' and '.join(models)}: one file a judge.")
    return answers


def index_answers(path: Path, rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(rows, 1):
        if not ANSWER.keys() <= record.keys():
            raise UserError(f"{path}, line {number}: not an answer of `run`; take that line out.")
        check_fields({name: record[name] for name in ANSWER}, ANSWER, f"{path}, line {number}")
        key = record["key"]
        if key in answers:
            raise UserError(f"{path}, line {number}: a second answer to {key}; take one of them out.")
        answers[key] = record
    return answers


class AnswerLog:
    """The open file of one run. Opening it keeps other runs out; a torn last line is written over.

    Raises:
        UserError: another run has it open, or it holds answers of another model.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.model = model
        self._log = JsonLog(path, durable=True)
        try:
            self.answers = index_answers(path, self._log.rows)
            self._refuse_other_model()
        except UserError:
            self._log.close()
            raise

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Put the first answer to a request on disk; a failed write leaves the file as it was."""
        if key in self.answers:
            raise ValueError(f"{key} was answered before.")
        record = {"key": key, "model": self.model, **record}
        self._log.append([record])
        self.answers[key] = record

    def _refuse_other_model(self) -> None:
        others = {record["model"] for record in self.answers.values()} - {self.model}
        if others:
            raise UserError(f"{self.path} holds answers of {others.pop()}: give --answers another file.")
