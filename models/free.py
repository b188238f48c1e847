"""FREE (Bae et al., 2023): one exit, and synchronized parallel decoding of the tokens that took it.

`Free(shallow_layer, confidence, threshold)` decides and catches up; what a parallel pass then says to the
tokens before it is the affair of `models.verification`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.checks import as_count, as_number, as_object
from models.confidence import ConfidenceMeasure, measure_states
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError
from models.exit_policy import (
    StepResult,
    check_adapter,
    check_layer,
    check_windows,
    choose_rows,
    layers_run,
    run_undecided,
)
from models.host import argmax
from models.prompt_lookup import PromptLookup, as_lookup, check_lookup
from models.threshold import AdaptiveThreshold, Threshold, as_threshold, without_nan
from models.verification import Drafting, Rollback, Verification, WindowToken


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

    `lookup` proposes tokens that the text has had before, which save shallow steps and are verified in the
    same pass. It does not change what is decoded, unless the threshold adapts or `max_pending` cuts
    windows: where the exit is sure, its token stands (or, lossless, is a draft, too), else the deep model's.
    One sequence at a time.

    With several rows, any unsure row makes all rows catch up; sure rows keep their shallow token, unless it
    is a draft. The first draft that any row rejects makes all rows go on from there.

    An exit adapter with a `kv_layer` may say something else to a token, the longer those before it wait: what
    is decoded, unless lossless, then depends on `max_pending`, a lookup and the other rows, too.

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
        lookup: PromptLookup | None = None,
    ) -> None:
        if lossless and (copy_skipped or rollback_threshold is not None or not causal_catch_up):
            raise UserError("lossless excludes copy_skipped, rollback_threshold and causal_catch_up=False.")
        if copy_skipped and not (rollback_threshold is None and max_pending is None and causal_catch_up):
            raise UserError(
                "copy_skipped removes the parallel pass: it excludes rollback_threshold, max_pending and "
                "causal_catch_up=False."
            )
        if lookup is not None and (copy_skipped or rollback_threshold is not None or not causal_catch_up):
            raise UserError("lookup excludes copy_skipped, rollback_threshold and causal_catch_up=False.")
        if shallow_layer is None:  # what the exit_config of a checkpoint without exits says
            raise UserError("Free: shallow_layer is None: the checkpoint was not trained with one; name it.")
        self.shallow_layer = as_count("Free: shallow_layer", shallow_layer)
        self.confidence = as_object("Free: confidence", confidence, "SoftmaxGap()")
        self.threshold = as_threshold("Free: threshold", threshold)
        self.copy_skipped = copy_skipped
        self.causal_catch_up = causal_catch_up
        self.max_pending = None if max_pending is None else as_count("Free: max_pending", max_pending)
        self.lookup = as_lookup("Free: lookup", lookup)
        self.lossless = lossless  # whether shallow tokens are only proposals
        self.verification: Verification | None = None
        if lossless or lookup is not None:
            self.verification = Drafting(None if lossless else self.shallow_layer)
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
    def learner(self) -> AdaptiveThreshold | None:
        """The threshold if it is adaptive and still learns, which deep passes then teach."""
        threshold = self.threshold
        return threshold if isinstance(threshold, AdaptiveThreshold) and threshold.learning else None

    @property
    def catches_up_at_end(self) -> bool:
        """Whether tokens that wait when a sequence ends run the deep layers: to be verified, or to teach."""
        return self.lossless or (self.learner is not None and not self.learner.as_released)

    def begin(self, view: DecoderView, batch_size: int) -> None:
        if self.lossless:
            check_windows("Free: lossless", view)
        check_layer("Free: shallow_layer", self.shallow_layer, view.num_layers - 1)
        check_adapter("Free: shallow_layer", self.shallow_layer, view)
        if isinstance(self.verification, Rollback) and batch_size > 1:
            # Alone, a row judges its tokens at its own deep passes: others' would change its output.
            raise UserError("Free with a rollback_threshold decodes one sequence at a time.")
        if self.lookup is not None:
            check_lookup("Free", batch_size)
        self.threshold.start_sequence()

    def propose(self, state: DecoderState, text: Tensor) -> Tensor:
        """What the lookup finds to follow (B, T) ids: (B, m) ids, m = 0 for nothing."""
        if self.lookup is None:
            return text[:, :0]
        most = self.lookup.tokens if self.max_pending is None else self.max_pending - len(state.waiting)
        return self.lookup.propose(text, most)

    def step(
        self, view: DecoderView, state: DecoderState, token_ids: Tensor, position: int, active: list[bool]
    ) -> StepResult:
        # Step 1. Run the shallow layers and test their predictions, behind what the lookup proposed, too; but
        # lossless, a proposal goes on anyway: drafts behind it seldom stand.
        hidden = view.run_layers(state, view.embed(state, token_ids), 0, self.shallow_layer)  # (B, W, D)
        if self.lossless and hidden.shape[1] > 1 and self.learner is None:
            view.read_exit(state, hidden, self.shallow_layer)  # whose keys/values later tokens see
            parts = hidden.split(1, dim=1)
            tokens = [WindowToken(one, [], sure=[False], active=active, logits=None) for one in parts]
        else:
            tokens = self._test(view, state, hidden, position, active)
        if len(tokens) > 1:
            tokens = mark_proposed(tokens, token_ids)
        newest, overruled = tokens[-1], self._count_overruled(tokens)
        # Step 2. Stop here, or run the deep layers for this token and all that wait.
        if overruled or all(row or not running for row, running in zip(newest.sure, active, strict=True)):
            result = self._stop(view, state, tokens, overruled)
        else:
            result = self._catch_up(view, state, tokens)
        result.proposed_layers = [
            self.shallow_layer if token.exits else view.num_layers for token in tokens[:-1]
        ]
        if result.deep_pass and any(newest.sure) and not self.lossless:
            assert newest.logits is not None
            result.logits = choose_rows(newest.sure, newest.logits, result.logits)
            result.exit_layers = [self.shallow_layer if row else view.num_layers for row in newest.sure]
        return result

    def finish(self, view: DecoderView, state: DecoderState) -> StepResult | None:
        """Catch up on the tokens still waiting, to verify them or to teach an adaptive threshold."""
        proposed = any(token.proposed for token in state.waiting)
        if not state.waiting or not (self.catches_up_at_end or proposed):
            return None
        return self._catch_up(view, state, [])

    def _test(
        self, view: DecoderView, state: DecoderState, hidden: Tensor, position: int, active: list[bool]
    ) -> list[WindowToken]:
        """What the exit says to the newest W tokens, (B, W, D) of which B or W is 1."""
        width = hidden.shape[1]
        states = view.read_exit(state, hidden, self.shallow_layer).flatten(0, 1)  # (B * W, D)
        measured = measure_states(self.confidence, view, states, self.shallow_layer)
        values, logits = measured.confidence.tolist(), measured.logits
        confidence = [values] if width == 1 else [[value] for value in values]
        thresholds = [self.threshold.at(position + index) for index in range(width)]
        sure = [[value > at for value in row] for row, at in zip(confidence, thresholds, strict=True)]
        if self.must_catch_up(view, state, len(state.waiting) + width, proposed=width > 1):
            sure[-1] = [False] * len(active)
        if logits is None and (any(sure[-1]) or width > 1 or self.learner is not None):
            logits = view.predict(states, self.shallow_layer)
        if width == 1:  # nearly always, and as fast as it can be
            return [WindowToken(hidden, confidence[0], sure[0], active, logits)]
        assert logits is not None
        parts = enumerate(zip(hidden.split(1, dim=1), logits.split(1), strict=True))
        return [WindowToken(part, confidence[i], sure[i], active, said) for i, (part, said) in parts]

    def must_catch_up(
        self, view: DecoderView, state: DecoderState, count: int, *, proposed: bool = False
    ) -> bool:
        """Whether the newest of `count` tokens that have not run the deep layers runs them however sure the
        exit is: no more may wait, one of this step was `proposed` and is to be verified, or a draft would
        need a position that the model lacks, and perhaps not the text."""
        if self.max_pending is not None and count > self.max_pending:
            return True
        if self.lossless and proposed:
            return True
        return self.lossless and view.max_positions is not None and state.lengths[0] >= view.max_positions

    def _count_overruled(self, tokens: list[WindowToken]) -> int:
        """How many of the newest proposals go at once: from the first on where the exit is sure of another
        token. Lossless, where its word is no more than the lookup's, none does."""
        if not self.lossless:
            for index, token in enumerate(tokens[:-1]):
                if token.sure[0] and not token.exits:
                    return len(tokens) - 1 - index
        return 0

    def _stop(
        self, view: DecoderView, state: DecoderState, tokens: list[WindowToken], overruled: int
    ) -> StepResult:
        """Let those tokens wait that are not overruled; what the exit says to the last of them comes next."""
        layer, ran = self.shallow_layer, layers_run(view, self.shallow_layer)
        *proposed, newest = tokens[: len(tokens) - overruled]
        assert newest.logits is not None
        if self.copy_skipped:
            view.write_kv(state, newest.hidden, layer, view.num_layers)
        else:
            waits = newest if self.learner is not None or self.retracts else newest._replace(logits=None)
            if overruled:  # the last of them is followed by what the exit says
                waits = waits._replace(proposed=False, exits=False)
            state.waiting += [*proposed, waits]
        result = StepResult(newest.logits, [layer] * len(newest.active), ran, ran * len(tokens))
        result.confidences, result.retract = [token.confidence for token in tokens], overruled
        in_question = self.lookup is None or any(token.proposed for token in state.waiting)
        result.stands = not (self.lossless or in_question)
        return result

    def _catch_up(self, view: DecoderView, state: DecoderState, tokens: list[WindowToken]) -> StepResult:
        """Run layers S+1..L in parallel on a window of W tokens: those that wait and this step's, the newest
        of which is not sure; none once the sequence is closing."""
        window, closing, learner = [*state.waiting, *tokens], not tokens, self.learner
        state.waiting = []
        ran, deep = layers_run(view, self.shallow_layer), view.num_layers - self.shallow_layer
        # Step 1. Exact deep states of the whole window (section 4.2); nobody needs all logits but to compare.
        hidden = self._run_deep_layers(view, state, window)
        compared = hidden if learner is not None or self.retracts else hidden[:, -1:]
        logits = view.predict(compared, view.num_layers)  # (B, W or 1, V)
        deep_rows = sum(sum(token.active) for token in window)  # of one that has ended, fewer tokens wait
        result = StepResult(
            logits[:, -1],
            [view.num_layers] * len(window[-1].active),
            layer_calls=deep if closing else ran + deep,
            layer_tokens=ran * len(tokens) + deep * len(window),
            confidences=[token.confidence for token in tokens if token.confidence],
            layer_tokens_of_rows=sum(ran * sum(token.active) for token in tokens) + deep * deep_rows,
            deep_pass=True,
        )
        # Step 2. Where shallow and deep predictions agree, the threshold learns (section 4.3).
        if learner is not None:
            result.calibration = self._teach(learner, window, logits)
        # Step 3. Judge the shallow tokens of the window: all of them, or all but the unsure one's.
        if self.verification is not None:
            self.verification.judge(window if closing else window[:-1], logits, result, closing=closing)
        return result

    def _run_deep_layers(self, view: DecoderView, state: DecoderState, window: list[WindowToken]) -> Tensor:
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
        self, learner: AdaptiveThreshold, window: list[WindowToken], deep_logits: Tensor
    ) -> list[tuple[float, bool]]:
        """Tell the threshold where shallow and deep predictions agree: pairs over the parallel window."""
        if not (self.copy_skipped or learner.counts(len(window))):
            return []
        shallow = torch.stack([waiting.predicted for waiting in window], dim=1)  # (B, W)
        right = (shallow == argmax(deep_logits)).tolist()
        pairs = [
            (waiting.confidence[row], right[row][index])
            for index, waiting in enumerate(window)
            for row, running in enumerate(waiting.active)
            if running and not (self.copy_skipped and waiting.sure[row])  # which ran no deep layers
        ]
        learner.observe(pairs)
        return without_nan(pairs)


def mark_proposed(tokens: list[WindowToken], token_ids: Tensor) -> list[WindowToken]:
    """The tokens of (1, W) ids; all but the newest are followed by what a lookup proposed."""
    *before, newest = tokens
    marked = (
        token._replace(proposed=True, exits=token.sure[0] and int(token.predicted) == follower)
        for token, follower in zip(before, token_ids[0, 1:].tolist(), strict=True)
    )
    return [*marked, newest]
