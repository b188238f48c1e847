"""FREE (Bae et al., 2023): one exit, and synchronized parallel decoding of the tokens that took it.

`Free(shallow_layer, confidence, threshold)` decides and catches up; what a parallel pass then says to the
tokens before it is the affair of `models.verification`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.checks import as_count, as_number, as_object
from models.choices import EXACT_PRECISIONS
from models.confidence import ConfidenceMeasure
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError
from models.exit_policy import StepResult, check_layer, choose_rows, layers_run, run_undecided
from models.host import argmax
from models.threshold import AdaptiveThreshold, Threshold, as_threshold
from models.verification import Drafting, Rollback, Verification, WaitingToken


class Free:
    """FREE: one exit after `shallow_layer`, synchronized parallel decoding.

    Confident tokens stop there and wait; the first unconfident one runs the deep layers for itself and all
    waiting ones in parallel, which makes every key/value exact. The variants: `copy_skipped` copies states
    as CALM does instead of waiting; `rollback_threshold` takes back waiting tokens from the first where
    the exit's most probable one has a cross-entropy above it under the deep model; `causal_catch_up=False`
    lets the tokens of a parallel pass see each other in both directions, as the original's
    `--parallel_causal_mask False`.

    `lossless` makes every shallow token a draft that the next parallel pass accepts or rejects, as in
    speculative decoding (Leviathan et al., 2023): output equals full depth's, token for token when greedy,
    in distribution when sampling. `max_pending` forces a pass once that many tokens wait.

    With several rows, any unsure row makes all rows catch up; sure rows keep their shallow token, unless it
    is a draft. The first draft that any row rejects makes all rows go on from there.

    Raises:
        UserError: options that contradict each other.
    """

    def __init__(
        self,
        shallow_layer: int | None,
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
        if copy_skipped and not (rollback_threshold is None and max_pending is None and causal_catch_up):
            raise UserError(
                "copy_skipped removes the parallel pass: it excludes rollback_threshold, max_pending and "
                "causal_catch_up=False."
            )
        if shallow_layer is None:  # what the exit_config of a checkpoint without exits says
            raise UserError("Free: shallow_layer is None: the checkpoint was not trained with one; name it.")
        self.shallow_layer = as_count("Free: shallow_layer", shallow_layer)
        self.confidence = as_object("Free: confidence", confidence, "SoftmaxGap()")
        self.threshold = as_threshold("Free: threshold", threshold)
        self.copy_skipped = copy_skipped
        self.causal_catch_up = causal_catch_up
        self.max_pending = None if max_pending is None else as_count("Free: max_pending", max_pending)
        self.verification: Verification | None = None
        if lossless:
            self.verification = Drafting()
        elif rollback_threshold is not None:
            self.verification = Rollback(as_number("Free: rollback_threshold", rollback_threshold))

    @property
    def retracts(self) -> bool:
        """Whether steps may take tokens back."""
        return self.verification is not None

    @property
    def exit_layer(self) -> int:
        return self.shallow_layer

    @property
    def drafts(self) -> bool:
        """Whether shallow tokens are only proposals (`lossless`)."""
        return isinstance(self.verification, Drafting)

    @property
    def learner(self) -> AdaptiveThreshold | None:
        """The threshold if it is adaptive and still learns, which deep passes then teach."""
        threshold = self.threshold
        return threshold if isinstance(threshold, AdaptiveThreshold) and threshold.learning else None

    def begin(self, view: DecoderView, batch_size: int) -> None:
        if self.drafts and view.mixes_windows:
            raise UserError(
                "Free: lossless needs tokens that do not depend on their window: prepare the model with "
                f"another precision: {', '.join(EXACT_PRECISIONS)}."
            )
        check_layer("Free: shallow_layer", self.shallow_layer, view.num_layers - 1)
        adapter = view.exit_adapter
        if adapter is not None and adapter.layer != self.shallow_layer:
            raise UserError(
                f"Free: shallow_layer {self.shallow_layer}: the exit adapter stands after {adapter.layer}."
            )
        if isinstance(self.verification, Rollback) and batch_size > 1:
            # Alone, a row judges its tokens at its own deep passes: others' would change its output.
            raise UserError("Free with a rollback_threshold decodes one sequence at a time.")
        self.threshold.start_sequence()

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        # Step 1. Run the shallow layers and test their prediction.
        hidden = view.run_layers(state, view.embed(state, token_ids), 0, self.shallow_layer)
        exit_states = view.read_exit(state, hidden, self.shallow_layer)[:, -1]  # (B, D)
        measured = self.confidence(view, exit_states, self.shallow_layer)
        confidence, threshold = measured.confidence.tolist(), self.threshold.at(position)
        sure = [value > threshold for value in confidence]
        if self.max_pending is not None and len(state.waiting) >= self.max_pending:
            sure = [False] * len(sure)
        exits = all(row or not running for row, running in zip(sure, active, strict=True))
        logits, learns = measured.logits, self.learner is not None
        if logits is None and (exits or any(sure) or learns):
            logits = view.predict(exit_states, self.shallow_layer)
        compared = logits if learns or self.retracts else None
        token = WaitingToken(hidden, confidence, sure, active, compared)
        # Step 2. Stop here, or run the deep layers for this token and all that wait.
        if exits:
            return self._stop(view, state, token, logits)
        result = self._catch_up(view, state, [*state.waiting, token], closing=False)
        if any(sure) and not self.drafts:
            result.logits = choose_rows(sure, logits, result.logits)
            result.exit_layers = [self.shallow_layer if row else view.num_layers for row in sure]
        return result

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        """Catch up on the tokens still waiting, to verify them or to teach an adaptive threshold."""
        learner = self.learner
        learns = learner is not None and not learner.as_released
        if not state.waiting or not (learns or self.drafts):
            return None
        return self._catch_up(view, state, state.waiting, closing=True)

    def _stop(
        self, view: DecoderView, state: DecoderState, token: WaitingToken, logits: Tensor
    ) -> StepResult:
        if self.copy_skipped:
            view.write_kv(state, token.hidden, self.shallow_layer, view.num_layers)
        else:
            state.waiting.append(token)
        layer, ran = self.shallow_layer, layers_run(view, self.shallow_layer)
        return StepResult(logits, [layer] * len(token.confidence), ran, ran, [token.confidence])

    def _catch_up(
        self, view: DecoderView, state: DecoderState, window: list[WaitingToken], *, closing: bool
    ) -> StepResult:
        """Run layers S+1..L on the W tokens of a window in parallel: those that wait and, unless the
        sequence is `closing`, the one that is not sure."""
        state.waiting, learner = [], self.learner
        shallow = 0 if closing else layers_run(view, self.shallow_layer)
        deep = view.num_layers - self.shallow_layer
        # Step 1. Exact deep states of the whole window (section 4.2); nobody needs all logits but to compare.
        hidden = self._run_deep_layers(view, state, window)
        compared = hidden if learner is not None or self.retracts else hidden[:, -1:]
        logits = view.predict(compared, view.num_layers)  # (B, W or 1, V)
        result = StepResult(
            logits[:, -1],
            [view.num_layers] * len(window[-1].active),
            layer_calls=shallow + deep,
            layer_tokens=shallow + deep * len(window),
            confidences=[window[-1].confidence],
            deep_pass=True,
        )
        # Step 2. Where shallow and deep predictions agree, the threshold learns (section 4.3).
        if learner is not None:
            result.calibration = self._teach(learner, window, logits)
        # Step 3. Judge the shallow tokens of the window: all of them, or all but the unsure one's.
        if self.verification is not None:
            self.verification.judge(window if closing else window[:-1], logits, result, closing=closing)
        return result

    def _run_deep_layers(self, view: DecoderView, state: DecoderState, window: list[WaitingToken]) -> Tensor:
        """Layers S+1..L on a parallel window: (B, W, D). Under `copy_skipped`, where W is 1, sure rows keep
        their shallow state, as they would alone."""
        hidden = torch.cat([token.hidden for token in window], dim=1)
        if self.copy_skipped and any(window[-1].sure):
            unsure = [not row for row in window[-1].sure]
            return run_undecided(view, state, hidden, self.shallow_layer, view.num_layers, unsure)
        return view.run_layers(
            state, hidden, self.shallow_layer, view.num_layers, causal=self.causal_catch_up
        )

    def _teach(
        self, learner: AdaptiveThreshold, window: list[WaitingToken], deep_logits: Tensor
    ) -> list[tuple[float, bool]]:
        """Tell the threshold where shallow and deep predictions agree: pairs over the parallel window."""
        alone = len(window) == 1 and not self.copy_skipped
        if learner.as_released and alone:  # the original counts only tokens that had company
            return []
        shallow = torch.stack([waiting.predicted for waiting in window], dim=1)  # (B, W)
        right = (shallow == argmax(deep_logits)).tolist()
        pairs = [
            (waiting.confidence[row], right[row][index])
            for index, waiting in enumerate(window)
            for row, running in enumerate(waiting.active)
            if running
        ]
        learner.observe([confidence for confidence, _ in pairs], [agrees for _, agrees in pairs])
        return pairs
