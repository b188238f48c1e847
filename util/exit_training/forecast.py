"""What an exit will bring, before anything is decoded with it: its decisions on held-out texts, replayed with
the cost of this machine's parts.

    costs = measure_costs(fast, layer, prompt_length)  # once for an exit, however well it is taught
    forecasts = forecast(costs, traces)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.confidence import SoftmaxGap
from models.errors import UserError
from models.exit_policy import ExitPolicy, FullDepth
from models.free import Free
from models.host import argmax
from models.json_files import check_keys, read_mapping
from models.loading import LoadedModel
from models.replay import CAPS, THRESHOLDS, replay
from util.evaluation.cost_model import median_seconds
from util.generate_options import greedy_options
from util.timing import Stopwatch

WINDOWS = (1, 2, 3, 5, 9)
REPEATS = 9
ALWAYS, NEVER = -1.0, 2.0  # thresholds that every confidence exceeds, and none
SECONDS = ("sample", "full_step", "shallow_step")  # of ExitCosts, its other fields being lists
SHORT, LONG = 8, 32  # tokens of the outputs by which a step is told from a sample


@dataclass
class ExitTrace:
    """What an exit says along the frozen model's own output of T tokens."""

    confidences: np.ndarray  # (T,)
    agrees: np.ndarray  # (T,) bool, with the last layer


@dataclass
class ExitCosts:
    """Seconds at batch 1."""

    sample: float  # prompt or source, and preparation
    full_step: float  # a token at full depth
    shallow_step: float  # a token up to the exit, its head and test included
    passes: Sequence[float]  # deep layers on so many tokens (`WINDOWS`), head on all: lossless
    passes_of_one: Sequence[float]  # the same, head on the last alone: FREE

    def deep_pass(self, tokens: int, lossless: bool) -> float:
        seconds = self.passes if lossless else self.passes_of_one
        if tokens <= WINDOWS[-1]:
            return float(np.interp(tokens, WINDOWS, seconds))
        slope = (seconds[-1] - seconds[-2]) / (WINDOWS[-1] - WINDOWS[-2])
        return seconds[-1] + slope * (tokens - WINDOWS[-1])


@dataclass
class Forecast:
    """One setting of FREE or lossless decoding, against full depth."""

    lossless: bool
    threshold: float
    max_pending: int | None
    speedup: float
    exit_share: float  # of tokens that stop at the exit, drafts that are taken back among them
    agreement: float  # share of exits that say what the last layer says
    unchanged: float  # share of tokens equal to full depth's, if what precedes them is

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def read_costs(path: Path, layers: Sequence[int]) -> dict[int, ExitCosts]:
    """By layer, what an earlier teaching measured and wrote to its train_exit.json.

    Raises:
        UserError: the file holds no costs, or none of a layer.
    """
    written = read_mapping(path, "--cost_file").get("cost_seconds")
    found = written if isinstance(written, dict) else {}
    for layer in layers:
        place = f"--cost_file {path}: cost_seconds of layer {layer}"
        if not isinstance(found.get(str(layer)), dict):
            raise UserError(f"{place} are missing; teach there with --exit_layers {layer}, or leave it out.")
        row, lists = found[str(layer)], dict.fromkeys(("passes", "passes_of_one"), list[float])
        check_keys(row, dict.fromkeys(SECONDS, float) | lists, place)
        for name in lists:
            if len(row[name]) != len(WINDOWS):
                raise UserError(f"{place}: {name} must hold {len(WINDOWS)} numbers, not {len(row[name])}.")
    return {layer: ExitCosts(**found[str(layer)]) for layer in layers}


def measure_costs(fast: LoadedModel, layer: int, sources: Sequence[Any]) -> ExitCosts:
    """Time the parts as decoding runs them. `sources`: inputs of `generate`, of typical length."""
    shallow, full, passes, passes_of_one = time_layers(fast, layer, sources[0])
    # Around the layers are the loop's own steps, which weigh as much as those of a small model.
    measure, drafts = SoftmaxGap(), not fast.view.mixes_windows
    step, sample = time_decoding(fast, sources, FullDepth())
    exiting, _ = time_decoding(fast, sources, Free(layer, measure, ALWAYS))
    staying, _ = time_decoding(fast, sources, Free(layer, measure, NEVER))
    drafting, _ = time_decoding(fast, sources, Free(layer, measure, NEVER, lossless=drafts))
    shallow_step = max(exiting, shallow)
    return ExitCosts(
        sample,
        max(step, full),
        shallow_step,
        as_decoded(passes, drafting - shallow_step),
        as_decoded(passes_of_one, staying - shallow_step),
    )


@torch.inference_mode()
def time_layers(
    fast: LoadedModel, layer: int, inputs: Any
) -> tuple[float, float, Sequence[float], Sequence[float]]:
    """Seconds of a token's layers up to the exit, its test included, and of all; of the deep layers on as
    many tokens as `WINDOWS` say, with the head on all of them and on the last alone."""
    view, measure = fast.view, SoftmaxGap()
    read = view.read(inputs["input_ids"], inputs["attention_mask"])
    state = view.begin(None, **read.arguments)
    prompt = inputs["input_ids"][:, :1].repeat(1, 2) if read.prompt is None else read.prompt
    hidden = view.embed(state, prompt)
    view.read_exit(state, view.run_layers(state, hidden, 0, layer), layer)
    view.run_layers(state, hidden, layer, view.num_layers)
    held = state.lengths[0]
    window = hidden[:, :1].repeat(1, WINDOWS[-1], 1)

    def shallow() -> None:
        state.truncate(held)
        states = view.read_exit(state, view.run_layers(state, window[:, :1], 0, layer), layer)
        measure(view, states[:, -1], layer).confidence.tolist()

    def full() -> None:
        state.truncate(held)
        view.predict(view.run_layers(state, window[:, :1], 0, view.num_layers)[:, -1], view.num_layers)

    def deep(size: int, read_all: bool) -> Callable[[], None]:
        def call() -> None:
            state.truncate(held)
            states = view.run_layers(state, window[:, :size], layer, view.num_layers)
            argmax(view.predict(states if read_all else states[:, -1:], view.num_layers))

        return call

    calls = [shallow, full, *(deep(size, read_all) for read_all in (True, False) for size in WINDOWS)]
    parts = median_seconds(calls, fast.model.device, REPEATS)
    return parts[0], parts[1], parts[2 : 2 + len(WINDOWS)], parts[2 + len(WINDOWS) :]


def as_decoded(passes: Sequence[float], first: float) -> tuple[float, ...]:
    """Seconds of passes within the loop, where the one over a lone token takes `first`."""
    loop = max(first - passes[0], 0.0)
    return tuple(seconds + loop for seconds in passes)


def time_decoding(fast: LoadedModel, sources: Sequence[Any], policy: ExitPolicy) -> tuple[float, float]:
    """Seconds of a token, and of a sample besides its tokens."""
    times: dict[int, list[float]] = {SHORT: [], LONG: []}
    no_token = fast.model.get_output_embeddings().weight.shape[0]  # so that nothing ends early
    for inputs in sources:
        for tokens, own in times.items():
            options = greedy_options({"max_new_tokens": tokens}) | {"eos_token_id": no_token}
            with Stopwatch(fast.model.device) as watch:
                fast.generate(**inputs, **options, exit_policy=policy)
            own.append(watch.seconds)
    short, long = (statistics.median(own[1:] or own) for own in times.values())  # the first one warms up
    step = max(long - short, 0.0) / (LONG - SHORT)
    return step, max(short - SHORT * step, 0.0)


def forecast(costs: ExitCosts, traces: Sequence[ExitTrace]) -> list[Forecast]:
    """Every setting: FREE by threshold, lossless by threshold and cap."""
    free = [predict(costs, traces, threshold, None, False) for threshold in THRESHOLDS]
    drafting = product(THRESHOLDS, CAPS)
    return free + [predict(costs, traces, threshold, cap, True) for threshold, cap in drafting]


def best(forecasts: Sequence[Forecast], lossless: bool, min_agreement: float = 0.0) -> Forecast | None:
    """The fastest setting in which enough tokens equal full depth's; None if there is none."""
    fitting = [one for one in forecasts if one.lossless == lossless]
    good = [one for one in fitting if lossless or one.unchanged >= min_agreement]
    return max(good, key=lambda one: one.speedup, default=None)


def predict(
    costs: ExitCosts, traces: Sequence[ExitTrace], threshold: float, cap: int | None, lossless: bool
) -> Forecast:
    seconds = full = 0.0
    exits = right = 0
    for trace in traces:
        sure, tokens = trace.confidences > threshold, len(trace.agrees)
        steps, windows = replay(sure, trace.agrees, cap, lossless)
        deep = sum(costs.deep_pass(window, lossless) for window in windows)
        seconds += costs.sample + steps * costs.shallow_step + deep
        full += costs.sample + tokens * costs.full_step
        exits += int(sure.sum())
        right += int((sure & trace.agrees).sum())
    total = sum(len(trace.agrees) for trace in traces)
    unchanged = 1.0 if lossless else 1 - (exits - right) / total
    share, agreement = exits / total, right / max(exits, 1)
    return Forecast(lossless, threshold, cap, full / seconds, share, agreement, unchanged)


def trace_exit(logits: Tensor, tokens: Tensor, has_shortlist: bool) -> ExitTrace:
    """Of an exit's logits (T, V), or (T, K + 1) if it has a shortlist, and the places of the last layer's
    tokens among them (T,), -1 where they are none of them."""
    shares = logits.float().softmax(-1)
    listed = shares[:, :-1] if has_shortlist else shares
    top, chosen = listed.topk(2, dim=-1)
    return ExitTrace((top[:, 0] - top[:, 1]).cpu().numpy(), (chosen[:, 0] == tokens).cpu().numpy())
