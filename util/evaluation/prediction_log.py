"""predictions.jsonl: one line a sample, flushed at once; what it depends on lies beside it.

An interrupted evaluation continues from it, unless anything is not what it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from models.errors import UserError
from util.files import JsonLog
from util.tables import write_json


class PredictionLog:
    """The open file of one evaluation. `records` are those of an interrupted one that it continues.

    Raises:
        UserError: another run is writing to it; asked to continue what was begun with another `identity`.
    """

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.settings_path = path.with_name(path.stem + ".settings.json")
        self.identity = json.loads(json.dumps(identity))
        self._log = JsonLog(path, fresh=not resume)
        try:
            if self._log.rows:
                self._refuse_other_identity()
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

    @property
    def records(self) -> list[dict[str, Any]]:
        return self._log.rows

    def keep(self, records: list[dict[str, Any]]) -> None:
        """Leave exactly these records in the file."""
        self._log.keep(records)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        self._log.append(records)

    def _refuse_other_identity(self) -> None:
        if not self.settings_path.is_file():
            raise UserError(f"--resume_eval: {self.settings_path} is missing; set --resume_eval False.")
        before = json.loads(self.settings_path.read_text(encoding="utf8"))
        names = {*before, *self.identity}
        changed = sorted(name for name in names if before.get(name) != self.identity.get(name))
        if changed:
            raise UserError(
                f"--resume_eval: {self.path} was begun with other {', '.join(changed)}; "
                "use what it was begun with, or start afresh with --resume_eval False."
            )
