"""answers.jsonl: each answer appended and on disk before the next step, one a request, one writer.

A line has `key` (of the request), `model` (the judge, as asked for), `answer` (text), `finish_reason`,
`usage`, `served_model`, `seconds` and `attempts`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from models.errors import UserError


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Answers by key of request; a last line that a kill cut off does not count.

    Raises:
        UserError: a whole line is not an answer, or two answer the same request.
    """
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    answers: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key, _ = record["key"], record["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}, line {number}: not an answer of `run`; take that line out.") from error
        if key in answers:
            raise UserError(f"{path}, line {number}: a second answer to {key}; take one of them out.")
        answers[key] = record
    return answers


class AnswerLog:
    """The open file of one run. Opening it drops a torn last line and keeps other runs out.

    Raises:
        UserError: another run has it open, or it holds answers of another model.
    """

    def __init__(self, path: Path, model: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.model = model
        self._lock = FileLock(f"{path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{path}: another run is writing to it.") from error
        try:
            self.answers = read_answers(path)
            self._refuse_other_model()
        except UserError:
            self._lock.release()
            raise
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._drop_torn_line()
        sync_folder(path.parent)

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        self._lock.release()

    def append(self, key: str, record: dict[str, Any]) -> None:
        """Put the first answer to a request on disk; a failed write leaves the file as it was."""
        if key in self.answers:
            raise ValueError(f"{key} was answered before.")
        record = {"key": key, "model": self.model, **record}
        line = (json.dumps(record, ensure_ascii=True) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(f"{self.path}: the disk is full.")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise
        self.answers[key] = record

    def _refuse_other_model(self) -> None:
        others = {record.get("model") for record in self.answers.values()} - {self.model}
        if others:
            raise UserError(f"{self.path} holds answers of {others.pop()}: give --answers another file.")

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        os.ftruncate(self._file, content.rfind(b"\n") + 1)


def sync_folder(folder: Path) -> None:
    """Make a new file's name as durable as its lines."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
