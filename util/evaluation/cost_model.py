"""Predict what FREE would cost at any shallow layer and threshold, from one traced pass at full depth.

`CostModel.measure(...)` times this model's parts on this machine; `predict_free(cost, traces, layer,
threshold)` replays FREE's decisions on traced sequences and adds the parts up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.confidence import SoftmaxGap
from models.loading import LoadedModel
from models.replay import replay
from util.evaluation.records import Trace
from util.timing import Stopwatch

REPEATS = 40
PREFIX = 8  # cached tokens of a typical step
WINDOW = 4  # tokens of a typical parallel pass


@dataclass
class CostModel:
    """Seconds of the parts of decoding at batch 1."""

    layer: float  # one layer on one token
    parallel_token: float  # each further token of a parallel pass through one layer
    head: float  # final norm and vocabulary projection
    confidence: float  # the confidence test, projection excluded
    step: float  # the rest of a step: embedding, processors, criteria
    sample: float  # encoder and preparation of one sample

    @classmethod
    def measure(cls, loaded: LoadedModel, tokens: list[int], seconds: list[float]) -> CostModel:
        """Time layers and head alone; take the rest from (N,) samples, not all of one length, decoded at full
        depth."""
        parts = time_parts(loaded)
        per_token, per_sample = np.polyfit(tokens, seconds, 1)
        step = per_token - loaded.view.num_layers * parts["layer"] - parts["head"]
        return cls(**parts, step=max(float(step), 0.0), sample=max(float(per_sample), 0.0))

    def full_depth(self, tokens: int, num_layers: int) -> float:
        """Seconds of one sample at full depth."""
        return self.sample + tokens * (self.step + num_layers * self.layer + self.head)

    def free(self, windows: list[int], tokens: int, shallow: int, num_layers: int) -> float:
        """Seconds of one sample under FREE; `windows` are the sizes of its parallel passes."""
        shallow_step = self.step + shallow * self.layer + self.head + self.confidence
        deep_layer = [self.layer + (size - 1) * self.parallel_token for size in windows]
        passes = (num_layers - shallow) * sum(deep_layer) + len(windows) * self.head
        return self.sample + tokens * shallow_step + passes


@torch.inference_mode()
def time_parts(loaded: LoadedModel) -> dict[str, float]:
    """Median seconds of a layer, of a further token in it, of the head and of the confidence test."""
    view, measure = loaded.view, SoftmaxGap()
    device = loaded.model.device
    tokens = torch.ones(1, PREFIX, dtype=torch.long, device=device)
    state = view.begin(None, **view.read(tokens, torch.ones_like(tokens)).arguments)
    prefix = view.embed(state, tokens)  # (1, P, D)
    view.run_layers(state, prefix, 0, view.num_layers)

    def step(size: int, read: Callable[[Tensor], Any]) -> Callable[[], None]:
        """A step of `size` tokens and what reads its state; the layers leave the head's weights out of the
        processor's caches, as decoding does."""

        def call() -> None:
            hidden = view.run_layers(state, prefix[:, :size], 0, view.num_layers)
            read(hidden[:, -1])
            state.truncate(PREFIX)

        return call

    one, window, with_head, with_test = median_seconds(
        [
            step(1, lambda hidden: None),
            step(WINDOW, lambda hidden: None),
            step(1, lambda hidden: view.predict(hidden, view.num_layers)),
            step(1, lambda hidden: measure(view, hidden, view.num_layers)),
        ],
        device,
    )
    return {
        "layer": one / view.num_layers,
        "parallel_token": max(window - one, 0.0) / (WINDOW - 1) / view.num_layers,
        "head": max(with_head - one, 0.0),
        "confidence": max(with_test - with_head, 0.0),
    }


def median_seconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = REPEATS
) -> list[float]:
    """Median time of each call.

    All take turns, so that a slow moment of the machine hits all alike; each runs once before it is timed, so
    that it finds the processor's caches as it leaves them itself.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            call()
            with Stopwatch(device) as watch:
                call()
            own.append(watch.seconds)
    return list(map(statistics.median, times))


@dataclass
class Prediction:
    """What FREE would do at one shallow layer and threshold, if its outputs stayed full depth's."""

    shallow_layer: int
    threshold: float
    speedup: float
    exit_share: float
    agreement: float  # share of tokens equal to full depth's: all but exits that disagree
    unchanged: float  # share of sequences without such an exit

    def as_row(self) -> dict[str, float]:
        return vars(self)


def predict_free(cost: CostModel, traces: list[Trace], shallow_layer: int, threshold: float) -> Prediction:
    """Replay FREE's decisions: its shallow states are exact, so that its confidences are the traced ones."""
    seconds = full_seconds = 0.0
    exits, wrong, unchanged = 0, 0, 0
    for trace in traces:
        tokens, num_layers = trace.confidences.shape
        sure = trace.confidences[:, shallow_layer - 1] > threshold
        mistakes = int((sure & ~trace.agrees[:, shallow_layer - 1]).sum())
        _, windows = replay(sure, trace.agrees[:, shallow_layer - 1], cap=None, lossless=False)
        seconds += cost.free(windows, tokens, shallow_layer, num_layers)
        full_seconds += cost.full_depth(tokens, num_layers)
        exits, wrong, unchanged = exits + int(sure.sum()), wrong + mistakes, unchanged + (mistakes == 0)
    total = sum(len(trace.confidences) for trace in traces)
    return Prediction(
        shallow_layer,
        threshold,
        speedup=full_seconds / seconds,
        exit_share=exits / total,
        agreement=1 - wrong / total,
        unchanged=unchanged / len(traces),
    )


def recommend(predictions: list[Prediction], min_agreement: float) -> Prediction | None:
    """The fastest candidate whose tokens agree often enough; None if none does."""
    good = [candidate for candidate in predictions if candidate.agreement >= min_agreement]
    return max(good, key=lambda candidate: candidate.speedup, default=None)
