"""What a generation under way tells, token by token: events, and the streamer that makes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from transformers.generation import BaseStreamer

from models.decode_stats import DecodeStats


@dataclass(frozen=True)
class Chosen:
    """A token, which may be taken back if it is a draft."""

    token: int
    layer: int  # after which it stopped, from 1
    confidence: float | None  # of the newest exit test at its place; None where nothing was tested
    draft: bool
    seconds: float  # since the generation began
    layer_tokens: int  # layers run so far, on all tokens


@dataclass(frozen=True)
class Confirmed:
    """The oldest draft stands."""

    seconds: float
    layer_tokens: int


@dataclass(frozen=True)
class TakenBack:
    """The newest drafts go."""

    count: int


@dataclass(frozen=True)
class Ended:
    seconds: float
    layer_tokens: int


Event: TypeAlias = Chosen | Confirmed | TakenBack | Ended


class Stopped(Exception):
    """Nobody waits for the generation any more."""


class EventStreamer(BaseStreamer):
    """Hand it to `generate` of one row as `streamer`, and `stats` as `decode_stats`; `tell` gets each event,
    and ends the generation by raising `Stopped`."""

    def __init__(self, stats: DecodeStats, tell: Callable[[Event], None]) -> None:
        self.stats = stats
        self.tell = tell
        self.began = time.perf_counter()
        self.prompted = False
        self.drafts: list[float | None] = []  # confidences of those that await their verdict
        self.rejected: float | None = None  # that of the draft which the next token replaces
        self.standing = 0  # tokens that cannot be taken back any more

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, P), then tokens (1,) that stand."""
        if not self.prompted:
            self.prompted = True
            return
        self.standing += 1
        if self.drafts:
            self.drafts.pop(0)
            self.tell(Confirmed(self.seconds, self.stats.layer_tokens))
        else:
            tested = self._newest_confidence() if self.rejected is None else self.rejected
            self._choose(value, self.standing - 1, tested, draft=False)
            self.rejected = None

    def put_draft(self, value: Tensor) -> None:
        confidence = self._newest_confidence()
        self.drafts.append(confidence)
        self._choose(value, -1, confidence, draft=True)

    def take_back(self, count: int) -> None:
        self.rejected = self.drafts[-count]
        del self.drafts[-count:]
        self.tell(TakenBack(count))

    def end(self) -> None:
        self.tell(Ended(self.seconds, self.stats.layer_tokens))

    def _newest_confidence(self) -> float | None:
        tests = self.stats.confidences[-1]
        return tests[-1][0] if tests else None

    def _choose(self, value: Tensor, place: int, confidence: float | None, *, draft: bool) -> None:
        layer = self.stats.columns[place][0]
        assert layer is not None  # the only row has not finished before its last token
        work = self.stats.layer_tokens
        self.tell(Chosen(int(value), layer, confidence, draft, self.seconds, work))
