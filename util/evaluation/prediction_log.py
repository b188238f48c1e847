"""predictions.jsonl: one line a sample, flushed at once; what it depends on lies beside it.

An interrupted evaluation continues from it, unless anything is not what it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from models.errors import UserError
from models.json_files import read_mapping
from util.evaluation.records import Record
from util.files import JsonLog, write_json


class PredictionLog:
    """The open file of one evaluation. `records` are those of an interrupted one that it continues, and new
    ones.

    Raises:
        UserError: another run is writing to it; asked to continue what was begun with another `identity`, or
            a line is no record.
    """

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.settings_path = settings_file(path)
        self.identity = identity
        self.records: list[Record] = []
        self._log = JsonLog(path, fresh=not resume)
        try:
            if self._log.rows:
                refuse_other_identity(path, self.identity)
                rows = enumerate(self._log.rows, 1)
                self.records = [Record.from_row(row, f"{path}, line {number}") for number, row in rows]
            else:  # the old predictions went first, so that no kill leaves them under new settings
                write_json(self.settings_path, self.identity)
        except BaseException:
            self._log.close()
            raise

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def keep(self, records: list[Record]) -> None:
        """Leave exactly these records in the file."""
        self._log.keep([record.as_row() for record in records])
        self.records = list(records)

    def append(self, records: list[Record]) -> None:
        self._log.append([record.as_row() for record in records])
        self.records += records


def settings_file(path: Path) -> Path:
    """Beside the log `path`: what its records depend on."""
    return path.with_name(path.stem + ".settings.json")


def refuse_other_identity(path: Path, identity: dict[str, Any]) -> None:
    """Raise UserError where the log `path` was begun with anything else."""
    if not settings_file(path).is_file():
        raise UserError(f"--resume_eval: {settings_file(path)} is missing; set --resume_eval False.")
    changed = changed_names(path, identity)
    if changed:
        raise UserError(
            f"--resume_eval: {path} was begun with other {', '.join(changed)}; "
            "use what it was begun with, or start afresh with --resume_eval False."
        )


def changed_names(path: Path, identity: dict[str, Any]) -> list[str]:
    """In what the records of the log `path` were made differently."""
    now, before = json.loads(json.dumps(identity)), read_mapping(settings_file(path))
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
