"""When does a token stop? FullDepth, StaticExit, Calm and Free: objects that decode one token a step.

A policy is chosen by object: `generate(..., custom_generate=early_exit_decode, exit_policy=Free(...))`. To
add one, implement `ExitPolicy`. Layers count from 1: exiting at layer k means that layers 1..k ran.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checks import as_count, as_layers, as_number, as_object
from models.confidence import ConfidenceMeasure
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError
from models.threshold import AdaptiveThreshold, Threshold, as_threshold


@dataclass
class StepResult:
    """What one step decided and what it cost. B rows, V vocabulary."""

    logits: Tensor  # (B, V) of the token to choose next
    exit_layers: list[int]  # (B,)
    layer_calls: int  # layers executed one after the other
    layer_tokens: int  # layers executed, summed over the tokens they ran on, for one row
    confidences: list[list[float]] = field(default_factory=list)  # every test of the step, each (B,)
    deep_pass: bool = False
    retract: int = 0  # newest tokens to take back before `logits` chooses
    calibration: list[tuple[float, bool]] = field(default_factory=list)  # (shallow confidence, right)
    drafts: Drafts | None = None  # the newest tokens, where they await their verdict


@dataclass
class Drafts:
    """The newest n tokens of each row, chosen by a shallow exit, and what the deep layers say to them."""

    logits: Tensor  # (B, n, V)
    running: list[list[bool]]  # n x (B,) which rows were unfinished when the token was chosen


class ExitPolicy(Protocol):
    retracts: bool
    """Whether steps may take tokens back."""

    def begin(self, view: DecoderView, batch_size: int) -> None:
        """Reset what belongs to one generation; raise UserError for layers the decoder does not have."""

    def step(
        self, view: DecoderView, state: DecoderState, hidden: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        """Decode from (B, 1, D) embeddings of the newest tokens; `position` counts generated tokens from 0.

        Rows that are not active are finished and must not trigger work.
        """

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        """Do what is left once the sequence has ended."""


class SequencePolicy:
    """Defaults of policies that keep nothing between steps."""

    retracts = False

    def begin(self, view: DecoderView, batch_size: int) -> None:
        pass

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        return None


class FullDepth(SequencePolicy):
    """Every token runs all layers: the model as it is."""

    def step(
        self, view: DecoderView, state: DecoderState, hidden: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        return static_step(view, state, hidden, view.num_layers)


class StaticExit(SequencePolicy):
    """Static-Exiting: every token stops after `layer`; deeper layers are never run."""

    def __init__(self, layer: int) -> None:
        self.layer = as_count("StaticExit: layer", layer)

    def begin(self, view: DecoderView, batch_size: int) -> None:
        check_layer("StaticExit", self.layer, view.num_layers)

    def step(
        self, view: DecoderView, state: DecoderState, hidden: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        return static_step(view, state, hidden, self.layer)


class Calm(SequencePolicy):
    """CALM (Schuster et al., 2022): a token stops at the first layer whose confidence exceeds the threshold.

    Deeper layers get keys/values copied from the exit state. Tests follow `exit_layers`, or else every layer
    from `min_layer` on; the last layer is never tested.
    """

    def __init__(
        self,
        confidence: ConfidenceMeasure,
        threshold: Threshold | float,
        min_layer: int = 1,
        exit_layers: Iterable[int] | None = None,
    ) -> None:
        if exit_layers is not None and min_layer != 1:
            raise UserError("Calm takes min_layer or exit_layers, not both.")
        self.confidence = as_object("Calm: confidence", confidence, "SoftmaxGap()")
        self.threshold = as_threshold("Calm: threshold", threshold)
        self.min_layer = as_count("Calm: min_layer", min_layer)
        self.exit_layers = (
            None if exit_layers is None else frozenset(as_layers("Calm: exit_layers", exit_layers))
        )

    def begin(self, view: DecoderView, batch_size: int) -> None:
        check_layer("Calm: min_layer", self.min_layer, view.num_layers)
        for layer in self.exit_layers or ():
            check_layer("Calm: exit_layers", layer, view.num_layers)
        self.threshold.start_sequence()

    def tests(self, layer: int) -> bool:
        """Whether a token may stop after `layer`."""
        return layer >= self.min_layer if self.exit_layers is None else layer in self.exit_layers

    def step(
        self, view: DecoderView, state: DecoderState, hidden: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        threshold, num_layers = self.threshold.at(position), view.num_layers
        undecided = list(active)
        exit_layers = [num_layers] * len(active)
        logits, tests = None, []
        for layer in range(1, num_layers):
            hidden = run_undecided(view, state, hidden, layer, undecided)
            if not self.tests(layer):
                continue
            normalized = view.normalize(hidden[:, -1], layer)
            confidence, layer_logits = self.confidence(view, normalized)
            tests.append(confidence.tolist())
            exits = [row and value > threshold for row, value in zip(undecided, tests[-1], strict=True)]
            if not any(exits):
                continue
            layer_logits = view.project(normalized) if layer_logits is None else layer_logits
            logits = choose_rows(exits, layer_logits, logits)
            for row in range(len(exits)):
                if exits[row]:
                    exit_layers[row], undecided[row] = layer, False
            if not any(undecided):
                view.write_kv(state, hidden, layer, num_layers)
                return StepResult(logits, exit_layers, layer, layer, tests)
        hidden = run_undecided(view, state, hidden, num_layers, undecided)
        logits = choose_rows(undecided, view.project(view.normalize(hidden[:, -1], num_layers)), logits)
        return StepResult(logits, exit_layers, num_layers, num_layers, tests)


class PendingToken(NamedTuple):
    """A token that exited and still lacks deep keys/values."""

    hidden: Tensor  # (B, 1, D) un-normalized output of the shallow exit
    confidence: list[float]  # (B,)
    sure: list[bool]  # (B,)
    active: list[bool]  # (B,) which rows were unfinished
    logits: Tensor | None  # (B, V), kept only where a deep pass will compare them


class Free:
    """FREE (Bae et al., 2023): one exit after `shallow_layer`, synchronized parallel decoding.

    Confident tokens stop there and wait; the first unconfident one runs the deep layers for itself and all
    waiting ones in parallel, which makes every key/value exact. The variants: `copy_skipped` copies states
    as CALM does instead of waiting; `rollback_threshold` takes back the first waiting token whose
    cross-entropy under the deep model exceeds it, and all after it; `causal_catch_up=False` lets the tokens
    of a parallel pass see each other in both directions, as the original's `--parallel_causal_mask False`.

    `lossless` makes every shallow token a draft that the next parallel pass accepts or rejects, as in
    speculative decoding (Leviathan et al., 2023): output equals full depth's, token for token when greedy,
    in distribution when sampling. `max_pending` forces a pass once that many tokens wait.

    With several rows, any unsure row makes all rows catch up; sure rows keep their shallow token, unless it
    is a draft. The first draft that any row rejects makes all rows go on from there.
    """

    def __init__(
        self,
        shallow_layer: int,
        confidence: ConfidenceMeasure,
        threshold: Threshold | float,
        copy_skipped: bool = False,
        rollback_threshold: float | None = None,
        causal_catch_up: bool = True,
        lossless: bool = False,
        max_pending: int | None = None,
    ) -> None:
        if lossless and (copy_skipped or rollback_threshold is not None or not causal_catch_up):
            raise UserError("lossless excludes copy_skipped, rollback_threshold and causal_catch_up=False.")
        if copy_skipped and rollback_threshold is not None:
            raise UserError("rollback_threshold needs the parallel pass that copy_skipped removes.")
        if shallow_layer is None:  # what the exit_config of a checkpoint without exits says
            raise UserError("Free: shallow_layer is None: the checkpoint was not trained with one; name it.")
        self.shallow_layer = as_count("Free: shallow_layer", shallow_layer)
        self.confidence = as_object("Free: confidence", confidence, "SoftmaxGap()")
        self.threshold = as_threshold("Free: threshold", threshold)
        self.copy_skipped = copy_skipped
        if rollback_threshold is not None:
            rollback_threshold = as_number("Free: rollback_threshold", rollback_threshold)
        self.rollback_threshold = rollback_threshold
        self.causal_catch_up = causal_catch_up
        self.lossless = lossless
        self.max_pending = None if max_pending is None else as_count("Free: max_pending", max_pending)
        self.retracts = lossless or rollback_threshold is not None
        self.pending: list[PendingToken] = []

    @property
    def calibrates(self) -> bool:
        """Whether deep passes feed an adaptive threshold that still learns."""
        return isinstance(self.threshold, AdaptiveThreshold) and self.threshold.learning

    def begin(self, view: DecoderView, batch_size: int) -> None:
        check_layer("Free: shallow_layer", self.shallow_layer, view.num_layers)
        if self.rollback_threshold is not None and batch_size > 1:
            # Alone, a row judges its tokens at its own deep passes: others' would change its output.
            raise UserError("Free with a rollback_threshold decodes one sequence at a time.")
        self.pending = []
        self.threshold.start_sequence()

    def step(
        self, view: DecoderView, state: DecoderState, hidden: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        # Step 1. Run the shallow layers and test their prediction.
        hidden = view.run_layers(state, hidden, 0, self.shallow_layer)
        normalized = view.normalize(hidden[:, -1], self.shallow_layer)
        measured = self.confidence(view, normalized)
        confidence, threshold = measured.confidence.tolist(), self.threshold.at(position)
        sure = [value > threshold for value in confidence]
        if self.max_pending is not None and len(self.pending) >= self.max_pending:
            sure = [False] * len(sure)
        exits = all(row or not running for row, running in zip(sure, active, strict=True))
        logits = measured.logits
        if logits is None and (exits or any(sure) or self.calibrates):
            logits = view.project(normalized)
        compared = logits if self.calibrates or self.rollback_threshold is not None else None
        token = PendingToken(hidden, confidence, sure, active, compared)
        # Step 2. Stop here, or run the deep layers for this token and all that wait.
        if exits:
            return self._stop(view, state, token, logits)
        result = self._go_deep(view, state, token)
        if any(sure) and not self.lossless:
            result.logits = choose_rows(sure, logits, result.logits)
            result.exit_layers = [self.shallow_layer if row else view.num_layers for row in sure]
        return result

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        """Catch up on the tokens still waiting, to verify them or to teach an adaptive threshold."""
        learns = self.calibrates and not self.threshold.as_released
        if not self.pending or not (learns or self.lossless):
            return None
        *self.pending, last = self.pending
        return self._go_deep(view, state, last, shallow_calls=0)

    def _stop(
        self, view: DecoderView, state: DecoderState, token: PendingToken, logits: Tensor
    ) -> StepResult:
        if self.copy_skipped:
            view.write_kv(state, token.hidden, self.shallow_layer, view.num_layers)
        else:
            self.pending.append(token)
        layer = self.shallow_layer
        return StepResult(logits, [layer] * len(token.confidence), layer, layer, [token.confidence])

    def _go_deep(
        self,
        view: DecoderView,
        state: DecoderState,
        token: PendingToken,
        shallow_calls: int | None = None,
    ) -> StepResult:
        """Run layers S+1..L on the waiting tokens and `token`, W together; compare and roll back if asked."""
        window, self.pending = [*self.pending, token], []
        start, stop = self.shallow_layer, view.num_layers
        hidden = self._run_deep_layers(view, state, window)
        compares = self.calibrates or self.retracts
        compared = hidden if compares else hidden[:, -1:]
        logits = view.project(view.normalize(compared, stop))  # (B, W or 1, V)
        calls = start if shallow_calls is None else shallow_calls
        result = StepResult(
            logits[:, -1],
            [stop] * len(token.active),
            layer_calls=calls + stop - start,
            layer_tokens=calls + (stop - start) * len(window),
            confidences=[token.confidence],
            deep_pass=True,
        )
        if self.calibrates:
            result.calibration = self._calibrate(window, logits)
        if self.lossless:  # at the end of a sequence the window's last token is a draft as well
            count = len(window) if shallow_calls == 0 else len(window) - 1
            result.drafts = Drafts(logits[:, :count], [waiting.active for waiting in window[:count]])
        elif self.retracts:
            self._roll_back(view, state, window, logits, result)
        return result

    def _run_deep_layers(self, view: DecoderView, state: DecoderState, window: list[PendingToken]) -> Tensor:
        """Layers S+1..L on a parallel window: (B, W, D). Under `copy_skipped`, where W is 1, sure rows keep
        their shallow state, as they would alone."""
        hidden = torch.cat([token.hidden for token in window], dim=1)
        if self.copy_skipped and any(window[-1].sure):
            unsure = [not row for row in window[-1].sure]
            for layer in range(self.shallow_layer + 1, view.num_layers + 1):
                hidden = run_undecided(view, state, hidden, layer, unsure)
            return hidden
        return view.run_layers(
            state, hidden, self.shallow_layer, view.num_layers, causal=self.causal_catch_up
        )

    def _calibrate(self, window: list[PendingToken], deep_logits: Tensor) -> list[tuple[float, bool]]:
        """Tell the threshold where shallow and deep predictions agree: pairs over the parallel window."""
        alone = len(window) == 1 and not self.copy_skipped
        if self.threshold.as_released and alone:  # the original counts only tokens that had company
            return []
        shallow = torch.stack([waiting.logits.argmax(-1) for waiting in window], dim=1)  # (B, W)
        right = (shallow == deep_logits.argmax(-1)).tolist()
        pairs = [
            (waiting.confidence[row], right[row][index])
            for index, waiting in enumerate(window)
            for row, running in enumerate(waiting.active)
            if running
        ]
        self.threshold.observe([confidence for confidence, _ in pairs], [agrees for _, agrees in pairs])
        return pairs

    def _roll_back(
        self,
        view: DecoderView,
        state: DecoderState,
        window: list[PendingToken],
        deep_logits: Tensor,
        result: StepResult,
    ) -> None:
        """Take back the first waiting token that the deep model finds too unlikely, and all after it."""
        shallow = [waiting.logits.argmax(-1) for waiting in window[:-1]]
        if not shallow:
            return
        surprise = F.cross_entropy(deep_logits[0, :-1].float(), torch.cat(shallow), reduction="none")
        wrong = (surprise > self.rollback_threshold).tolist()
        if any(wrong):
            first = wrong.index(True)
            result.retract = len(shallow) - first
            result.logits = deep_logits[:, first]
            view.truncate(state, view.cached_length(state, 0) - result.retract)


def static_step(view: DecoderView, state: DecoderState, hidden: Tensor, layers: int) -> StepResult:
    """Run the first `layers` layers and predict from there."""
    hidden = view.run_layers(state, hidden, 0, layers)
    logits = view.project(view.normalize(hidden[:, -1], layers))
    return StepResult(logits, [layers] * len(logits), layers, layers)


def run_undecided(
    view: DecoderView, state: DecoderState, hidden: Tensor, layer: int, undecided: list[bool]
) -> Tensor:
    """Run one layer; rows that have exited keep their state, which thus also makes their keys/values."""
    advanced = view.run_layers(state, hidden, layer - 1, layer)
    return choose_rows(undecided, advanced, hidden)


def choose_rows(rows: list[bool], new: Tensor, old: Tensor | None) -> Tensor:
    """`new` where `rows` is true, else `old`: (B, ...), (B, ...) -> (B, ...)."""
    if old is None or all(rows):
        return new
    mask = torch.tensor(rows, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)


def check_layer(name: str, layer: int, num_layers: int) -> None:
    if not 1 <= layer <= num_layers:
        raise UserError(f"{name} must lie in 1..{num_layers}, got {layer}.")
