"""When does a token stop? FullDepth, StaticExit and Calm: objects that decode one token a step.

A policy is chosen by object: `generate(..., custom_generate=early_exit_decode, exit_policy=Calm(...))`. To
add one, implement `ExitPolicy`. What it keeps between steps goes into the generation's state, so that one
object serves many generations at once. Layers count from 1: exiting at layer k means that layers 1..k ran.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from models.checks import as_count, as_layers, as_object
from models.choices import EXACT_PRECISIONS
from models.confidence import ConfidenceMeasure, measure_states
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError
from models.prompt_lookup import PromptLookup, as_lookup, check_lookup
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
    proposed_layers: list[int] = field(default_factory=list)  # of what a lookup proposed: exits where sure
    layer_tokens_of_rows: int | None = None  # of all together, where some had ended before others
    stands: bool = False  # though the policy takes tokens back, it takes back none of those so far


@dataclass
class Drafts:
    """The newest n tokens of each row, said by a shallow exit or a lookup, and what those layers say to them
    whose word counts."""

    logits: Tensor  # (B, n, V)
    running: list[list[bool]]  # n x (B,) which rows were unfinished when the token was chosen
    layers: list[list[int]]  # n x (B,) after which layer the logits were read


class ExitPolicy(Protocol):
    """A policy may say by an attribute `exit_layer` after which one layer its tokens stop: an exit adapter
    there then reads the prompt, too; and by `stays_shallow` that none of them runs a deeper one. One with a
    `lookup` also has a method `propose`, as `models.free.Free`: `step` then gets what it proposed together
    with the newest token, (1, 1 + m) ids."""

    @property
    def retracts(self) -> bool:
        """Whether steps may take tokens back."""

    def begin(self, view: DecoderView, batch_size: int) -> None:
        """Get ready for a generation; raise UserError for what this decoder or batch cannot do."""

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        """Decode one token from the newest ones, (B, 1) ids; `position` counts generated tokens from 0.

        Rows that are not active are finished and must not trigger work.
        """

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        """Do what is left once the sequence has ended."""


class SequencePolicy:
    """Defaults of policies that keep nothing between steps."""

    retracts = False
    exit_layer: int | None = None
    stays_shallow = False

    def begin(self, view: DecoderView, batch_size: int) -> None:
        pass

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        return None


class FullDepth(SequencePolicy):
    """Every token runs all layers: the model as it is. A `lookup` proposes tokens that the text has had
    before, one sequence at a time, and the next step verifies them in parallel: the output stays the same."""

    def __init__(self, lookup: PromptLookup | None = None) -> None:
        self.lookup = as_lookup("FullDepth: lookup", lookup)
        self.retracts = lookup is not None

    def begin(self, view: DecoderView, batch_size: int) -> None:
        if self.lookup is not None:
            check_lookup("FullDepth", batch_size)
            check_windows("FullDepth with a lookup", view)

    def propose(self, state: DecoderState, text: Tensor) -> Tensor:
        """What the lookup finds to follow (B, T) ids: (B, m) ids, m = 0 for nothing."""
        return text[:, :0] if self.lookup is None else self.lookup.propose(text, self.lookup.tokens)

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        layers, proposed = view.num_layers, token_ids.shape[1] - 1
        logits = view.predict(view.run_layers(state, view.embed(state, token_ids), 0, layers), layers)
        result = StepResult(logits[:, -1], [layers] * len(active), layers, layers * (1 + proposed))
        result.deep_pass = self.retracts
        if proposed:
            result.proposed_layers = [layers] * proposed
            result.drafts = Drafts(logits[:, :-1], [active] * proposed, [result.exit_layers] * proposed)
        return result


class StaticExit(SequencePolicy):
    """Static-Exiting: every token stops after `layer`. Deeper layers run for the prompt alone, and only where
    a cache is handed back, or an exit adapter reads their keys/values.

    Raises:
        UserError: no such layer; of the model, once a generation begins.
    """

    exit_layer: int
    stays_shallow = True

    def __init__(self, layer: int) -> None:
        self.exit_layer = as_count("StaticExit: layer", layer)

    def begin(self, view: DecoderView, batch_size: int) -> None:
        check_layer("StaticExit: layer", self.exit_layer, view.num_layers)
        check_adapter("StaticExit: layer", self.exit_layer, view)

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        return static_step(view, state, token_ids, self.exit_layer)


class Calm(SequencePolicy):
    """CALM (Schuster et al., 2022): a token stops at the first layer whose confidence exceeds the threshold.

    Deeper layers get keys/values copied from the exit state. Tests follow `exit_layers`, or else every layer
    from `min_layer` on; the last layer is never tested.

    Raises:
        UserError: options that contradict each other, or no such layer, as for `StaticExit`.
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
        if isinstance(self.threshold, AdaptiveThreshold):
            raise UserError(
                "Calm: threshold: an AdaptiveThreshold learns from Free's deep passes alone: give "
                f"FixedThreshold({self.threshold.value:g})."
            )
        self.min_layer = as_count("Calm: min_layer", min_layer)
        self.exit_layers = (
            None if exit_layers is None else frozenset(as_layers("Calm: exit_layers", exit_layers))
        )
        if self.exit_layers is not None and not self.exit_layers:
            raise UserError("Calm: exit_layers: name at least one, or leave it out.")

    def begin(self, view: DecoderView, batch_size: int) -> None:
        if view.exit_adapter is not None:
            raise UserError(
                "CALM tests many layers, and an exit adapter serves one: load the model without exit_adapter."
            )
        check_layer("Calm: min_layer", self.min_layer, view.num_layers)
        for layer in self.exit_layers or ():
            check_layer("Calm: exit_layers", layer, view.num_layers)
        self.threshold.start_sequence()

    def tests(self, layer: int) -> bool:
        """Whether a token may stop after `layer`."""
        return layer >= self.min_layer if self.exit_layers is None else layer in self.exit_layers

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        threshold, num_layers = self.threshold.at(position), view.num_layers
        hidden = view.embed(state, token_ids)  # (B, 1, D)
        undecided = list(active)
        exit_layers = [num_layers] * len(active)
        logits, tests = None, []
        ran = 0
        for layer in filter(self.tests, range(1, num_layers)):
            hidden = run_undecided(view, state, hidden, ran, layer, undecided)
            ran = layer
            exit_hidden = hidden[:, -1]
            confidence, layer_logits = measure_states(self.confidence, view, exit_hidden, layer)
            tests.append(confidence.tolist())
            exits = [row and value > threshold for row, value in zip(undecided, tests[-1], strict=True)]
            if not any(exits):
                continue
            layer_logits = view.predict(exit_hidden, layer) if layer_logits is None else layer_logits
            logits = choose_rows(exits, layer_logits, logits)
            for row in range(len(exits)):
                if exits[row]:
                    exit_layers[row], undecided[row] = layer, False
            if not any(undecided):
                view.write_kv(state, hidden, layer, num_layers)
                return StepResult(logits, exit_layers, layer, layer, tests)
        hidden = run_undecided(view, state, hidden, ran, num_layers, undecided)
        logits = choose_rows(undecided, view.predict(hidden[:, -1], num_layers), logits)
        return StepResult(logits, exit_layers, num_layers, num_layers, tests)


def static_step(view: DecoderView, state: DecoderState, token_ids: Tensor, layers: int) -> StepResult:
    """Run the first `layers` layers and predict from there."""
    hidden = view.run_layers(state, view.embed(state, token_ids), 0, layers)
    logits = view.predict(view.read_exit(state, hidden, layers)[:, -1], layers)
    ran = layers_run(view, layers)
    return StepResult(logits, [layers] * len(logits), ran, ran)


def layers_run(view: DecoderView, layer: int) -> int:
    """Layers that a token runs which exits after `layer`: with an exit adapter, one more."""
    return layer if view.exit_adapter is None else view.exit_adapter.layers_run(layer)


def run_undecided(
    view: DecoderView, state: DecoderState, hidden: Tensor, start: int, stop: int, undecided: list[bool]
) -> Tensor:
    """Run layers `start`..`stop - 1`; rows that have exited keep their state, which thus also makes their
    keys/values, layer by layer."""
    if all(undecided):
        return view.run_layers(state, hidden, start, stop)
    for layer in range(start, stop):
        advanced = view.run_layers(state, hidden, layer, layer + 1)
        hidden = choose_rows(undecided, advanced, hidden)
    return hidden


def choose_rows(rows: list[bool], new: Tensor, old: Tensor | None) -> Tensor:
    """`new` where `rows` is true, else `old`: (B, ...), (B, ...) -> (B, ...)."""
    if old is None or all(rows):
        return new
    mask = torch.tensor(rows, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)


def check_policy(policy: Any) -> None:
    """Raise UserError for what is no policy: a class where an object of it is meant, or something else."""
    if isinstance(policy, type):
        raise UserError(
            f"exit_policy: give an object, {policy.__name__}(...), not the class {policy.__name__}."
        )
    missing = [name for name in ("begin", "step", "finish", "retracts") if not hasattr(policy, name)]
    if missing:
        raise UserError(f"exit_policy: {policy!r} is no policy; it lacks {', '.join(missing)}.")


def check_layer(name: str, layer: int, num_layers: int) -> None:
    if not 1 <= layer <= num_layers:
        raise UserError(f"{name} must lie in 1..{num_layers}, got {layer}.")


def check_adapter(name: str, layer: int, view: DecoderView) -> None:
    """Raise UserError for an exit after another layer than the exit adapter stands after, which has none."""
    adapter = view.exit_adapter
    if adapter is not None and layer not in (adapter.layer, view.num_layers):
        raise UserError(f"{name} {layer}: the exit adapter stands after {adapter.layer}.")


def check_windows(name: str, view: DecoderView) -> None:
    """Raise UserError where what is verified in a window may differ from what is decoded alone."""
    if view.mixes_windows:
        raise UserError(
            f"{name} needs tokens that do not depend on their window: prepare the model with another "
            f"precision: {', '.join(EXACT_PRECISIONS)}."
        )
