"""How far a long loop is: a bar on a terminal; elsewhere, as in a log, a line after 5 s, then every 30 s.

`for batch in track(batches, "Decoding", "batch"):`, or `with Progress("Asking", total, "request") as
progress:` and `progress.update()` where there is no loop.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

INTERVAL = 30.0  # seconds between lines
FIRST = 5.0  # until the first line of a loop


def on_terminal() -> bool:
    return sys.stderr.isatty()


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that reports."""
    return int(os.environ.get("RANK", 0)) == 0


def track(items: Sequence[Any], description: str, unit: str) -> Iterator[Any]:
    """The items, counted as they are done with."""
    with Progress(description, len(items), unit) as progress:
        for item in items:
            yield item
            progress.update()


class Progress:
    """A count towards `total`, shown while the `with` block lasts, also while a single step takes long.

    Without the block nothing is shown but what `report` and `report_if_due` are asked for.
    """

    def __init__(self, description: str, total: int, unit: str, done: int = 0) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = self.before = done  # `before` an interruption
        self.start = self.last_report = time.monotonic()
        self.reports = 0
        self._bar: tqdm[Any] | None = None
        self._finished = threading.Event()

    def __enter__(self) -> Progress:
        if not is_first_process():
            return self
        if on_terminal():
            self._bar = tqdm(total=self.total, initial=self.done, desc=self.description, unit=self.unit)
        else:
            threading.Thread(target=self._report_regularly, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()
        if self._bar is not None:
            self._bar.close()
        elif self.reports and kind is None:
            self.report()

    def update(self, count: int = 1) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def report_if_due(self) -> None:
        if time.monotonic() - self.last_report >= INTERVAL:
            self.report()

    def report(self) -> None:
        """Print one line to stderr."""
        self.last_report = time.monotonic()
        self.reports += 1
        print(self.describe(self.last_report - self.start), file=sys.stderr, flush=True)

    def describe(self, elapsed: float) -> str:
        """What is done after `elapsed` seconds, and how long the rest will take at this pace."""
        finished, left = self.done - self.before, self.total - self.done
        text = f"{self.description}: {self.done} of {self.total} {self.unit}s in {clock(elapsed)}"
        if left <= 0:
            return text
        return f"{text}, {clock(elapsed / finished * left)} to go" if finished else text

    def _report_regularly(self) -> None:
        wait = min(FIRST, INTERVAL)
        while not self._finished.wait(wait):
            self.report()
            wait = INTERVAL


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    return str(timedelta(seconds=round(seconds)))
