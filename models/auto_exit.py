"""FREE that finds its settings by itself: exit layer, threshold and cap are chosen from the first requests,
and go on following what later ones accept.

    policy = AutoExit(layers=[10], confidence=SoftmaxGap(), lossless=True)  # one object for all requests
    fast.generate(**inputs, exit_policy=policy)

After DEL (Zarch et al., 2025), with this machine's seconds in the place of layers.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from models.checks import as_count, as_layers, as_object, as_share
from models.confidence import ConfidenceMeasure
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError
from models.exit_policy import StepResult
from models.free import Free
from models.replay import CAPS, THRESHOLDS, replay
from models.threshold import FixedThreshold

FIRST_THRESHOLD, FIRST_CAP = 0.2, 4  # while nothing is known
NEVER = 2.0  # a threshold that no confidence exceeds
MEMORY = 64  # requests that a choice looks back on


@dataclass
class Watch:
    """What one request shows of an exit: pairs in the order of tokens, and seconds."""

    layer: int
    as_released = False  # what waits at the end counts, too
    pairs: list[tuple[float, bool]] = field(default_factory=list)  # (confidence, agrees with the last layer)
    shallow: list[float] = field(default_factory=list)  # seconds of steps without a deep pass
    deep: list[tuple[int, float]] = field(default_factory=list)  # tokens of a step with one, its seconds
    lossless: bool = False  # tokens after a wrong one follow another text
    window: int = 0  # tokens of the newest deep pass

    def counts(self, tokens: int) -> bool:
        """As a threshold that learns: every pass does."""
        return True

    def observe(self, pairs: list[tuple[float, bool]]) -> None:
        """Take note of the tokens of one deep pass."""
        self.window = len(pairs)
        wrong = (index for index, (_, agrees) in enumerate(pairs) if not agrees)
        self.pairs += pairs[: next(wrong, len(pairs)) + 1] if self.lossless else pairs

    def time(self, result: StepResult, seconds: float) -> None:
        if result.deep_pass:
            self.deep.append((self.window, seconds))
        else:
            self.shallow.append(seconds)

    def time_closing(self, seconds: float) -> None:
        """That of the pass over what waits at the end: a step without the shallow layers, which are added."""
        self.deep.append((self.window, seconds + statistics.median(self.shallow)))


class WatchedFree(Free):
    """FREE whose deep passes tell a watch where shallow and deep predictions agree."""

    watch: Watch

    @property
    def learner(self) -> Any:
        return self.watch


@dataclass(frozen=True)
class Choice:
    """Settings of FREE, and the seconds of a token that they were chosen for."""

    layer: int
    threshold: float
    max_pending: int | None
    seconds: float


class AutoExit:
    """FREE after one of `layers`, with the threshold and cap that made the first `requests` fastest.

    Every `requests` requests it chooses anew, from the last 64. Without `lossless`, settings are taken that
    leave at least `min_agreement` of tokens as they are, and what was chosen first stays. One sequence at a
    time; one object may serve several threads.

    Raises:
        UserError: no layer, or one that the model does not have; a batch.
    """

    def __init__(
        self,
        layers: Iterable[int],
        confidence: ConfidenceMeasure,
        lossless: bool = True,
        requests: int = 8,
        min_agreement: float = 0.99,
    ) -> None:
        self.layers = sorted(set(as_layers("AutoExit: layers", layers)))
        if not self.layers:
            raise UserError("AutoExit: layers: name at least one.")
        self.confidence = as_object("AutoExit: confidence", confidence, "SoftmaxGap()")
        self.lossless = lossless
        self.requests = as_count("AutoExit: requests", requests)
        self.min_agreement = as_share("AutoExit: min_agreement", min_agreement)
        self.watches: dict[int, deque[Watch]] = {layer: deque(maxlen=MEMORY) for layer in self.layers}
        self.seen = 0
        self.choice: Choice | None = None
        self.lock = threading.Lock()

    @property
    def retracts(self) -> bool:
        """Whether steps may take tokens back."""
        return self.lossless

    @property
    def exit_layer(self) -> int | None:
        return self.layers[0] if len(self.layers) == 1 else None

    def begin(self, view: DecoderView, batch_size: int) -> None:
        if batch_size > 1:
            raise UserError(
                "AutoExit decodes one sequence at a time: each row would want settings of its own."
            )
        for layer in self.layers:
            self._free(layer, FIRST_THRESHOLD, FIRST_CAP).begin(view, batch_size)

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        if state.plan is None:
            state.plan = self._plan()
        start = time.perf_counter()
        result = state.plan.step(view, state, token_ids, position, active)
        if isinstance(state.plan, WatchedFree):
            state.plan.watch.time(result, time.perf_counter() - start)
        return result

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        start = time.perf_counter()
        result = state.plan.finish(view, state)
        if isinstance(state.plan, WatchedFree):
            if result is not None:
                state.plan.watch.time_closing(time.perf_counter() - start)
            self._learn(state.plan.watch)
        return result

    def _plan(self) -> Free:
        """What the next request decodes with: at first each candidate layer in turn."""
        with self.lock:
            choice, turn = self.choice, self.seen % len(self.layers)
        if choice is None:
            choice = Choice(self.layers[turn], FIRST_THRESHOLD, FIRST_CAP, 0.0)
        elif not self.lossless:  # nothing verifies, and so nothing teaches
            return self._free(choice.layer, choice.threshold, choice.max_pending)
        free = self._free(choice.layer, choice.threshold, choice.max_pending, WatchedFree)
        assert isinstance(free, WatchedFree)
        free.watch = Watch(choice.layer, lossless=self.lossless)
        return free

    def _free(self, layer: int, threshold: float, cap: int | None, kind: type[Free] = Free) -> Free:
        return kind(
            layer, self.confidence, FixedThreshold(threshold), lossless=self.lossless, max_pending=cap
        )

    def _learn(self, watch: Watch) -> None:
        with self.lock:
            own = self.watches[watch.layer]
            known = any(watch is one for one in own)  # a rejected draft made the sequence go on
            if known or not watch.pairs:
                return
            own.append(watch)
            self.seen += 1
            if self.seen % self.requests == 0:
                self.choice = self._choose()

    def _choose(self) -> Choice:
        """The settings of fewest seconds a token over all that was watched."""
        caps = CAPS if self.lossless else (None,)
        choices = [
            self._rate(layer, threshold, cap)
            for layer, watched in self.watches.items()
            if watched
            for threshold, cap in product((*THRESHOLDS, NEVER), caps)
        ]
        return min((one for one in choices if one is not None), key=lambda one: one.seconds)

    def _rate(self, layer: int, threshold: float, cap: int | None) -> Choice | None:
        """None for settings that change too many tokens."""
        watched = self.watches[layer]
        shallow, intercept, slope = fit_costs(watched)
        seconds, tokens, wrong = 0.0, 0, 0
        for watch in watched:
            confidences, agrees = (np.array(column) for column in zip(*watch.pairs, strict=True))
            sure, agrees = confidences > threshold, agrees.astype(bool)
            steps, windows = replay(sure, agrees, cap, self.lossless)
            seconds += steps * shallow + len(windows) * intercept + sum(windows) * slope
            tokens += len(sure)
            wrong += int((sure & ~agrees).sum())
        if not self.lossless and wrong > (1 - self.min_agreement) * tokens:
            return None
        return Choice(layer, threshold, cap, seconds / tokens)


def fit_costs(watched: Iterable[Watch]) -> tuple[float, float, float]:
    """Seconds of a shallow step, of a deep pass of no tokens, and of each token in one."""
    watches = list(watched)
    deep: dict[int, list[float]] = {}
    for watch in watches:
        for window, seconds in watch.deep:
            deep.setdefault(window, []).append(seconds)
    medians = {window: statistics.median(all_seconds) for window, all_seconds in deep.items()}
    steps = [seconds for watch in watches for seconds in watch.shallow]
    shallow = statistics.median(steps) if steps else min(medians.values()) / 2  # no token was sure
    if len(medians) < 2:
        return shallow, max(next(iter(medians.values())) - shallow, 0.0), 0.0
    weights = [len(deep[window]) ** 0.5 for window in medians]
    slope, intercept = np.polyfit(list(medians), list(medians.values()), 1, w=weights)
    return shallow, max(float(intercept) - shallow, 0.0), max(float(slope), 0.0)
