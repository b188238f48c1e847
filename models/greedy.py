"""One sequence decoded greedily, where nobody but the model has a say: the commonest call, at its fastest.

A small model runs several layers in the time of a dozen operators of torch. `GreedyDecoding` decodes and
counts what `models.decoding.Decoding` does, with tokens as numbers.
"""

from __future__ import annotations

import functools
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from models.call import Call
from models.confidence import ConfidenceMeasure, SoftmaxGap, measure_states
from models.decoder_view import advance_in_parts, read_logits
from models.exit_policy import Calm, ExitPolicy, FullDepth, StaticExit, layers_run
from models.free import Free
from models.host import top_and_gap
from models.threshold import AdaptiveThreshold, without_nan
from models.token_choice import HostCriteria
from models.verification import Rollback

Policy = TypeVar("Policy", bound=ExitPolicy)


def greedy_decoding(call: Call) -> GreedyDecoding[Any] | None:
    """That of a call; None where tokens are not simply a single sequence's most probable ones, ids not on the
    CPU, or the policy is none that `knows` says yes to."""
    ids, ends = call.input_ids, call.chooser.ends
    alone = len(ids) == 1 and ids.device.type == "cpu"
    alone = alone and call.state.prompt_embeds is None and call.lookup_ids is None
    if not (alone and call.chooser.takes_the_most_probable and knows(call.policy)) or ends is None:
        return None
    if isinstance(call.policy, Free):
        return GreedyFree(call, call.policy, ends)
    if isinstance(call.policy, Calm):
        return GreedyCalm(call, call.policy, ends)
    return GreedyDecoding(call, call.policy, ends)


def knows(policy: ExitPolicy) -> bool:
    """Full depth, Static-Exiting, CALM and FREE, lossless or not; no lookups or rarer variants of FREE.
    Classes made of these may do anything."""
    if type(policy) not in (FullDepth, StaticExit, Calm, Free) or getattr(policy, "lookup", None) is not None:
        return False
    if not isinstance(policy, Free):
        return True
    return policy.causal_catch_up and not (policy.copy_skipped or isinstance(policy.verification, Rollback))


class Answer(NamedTuple):
    """What an exit says to a token."""

    hidden: Tensor  # (1, 1, D) un-normalized states after its layer, until the next token comes
    confidence: float
    token: int | None  # that follows it; None where it is not sure enough to be asked


class GreedyDecoding(Generic[Policy]):
    """One `generate` call under way in which all tokens run the same layers. D width, V vocabulary."""

    def __init__(self, call: Call, policy: Policy, ends: HostCriteria) -> None:
        """`policy` and `ends` are the call's."""
        view, state, input_ids = call.view, call.state, call.input_ids
        self.view = view
        self.state = state
        self.policy = policy
        self.ends = ends
        self.stream = call.stream
        self.stats = call.stats
        self.given = input_ids  # (1, P)
        self.tokens: list[int] = []  # new ones
        self.newest = input_ids[:, -1:].clone()  # (1, 1), not cached yet
        self.newest_token = self.newest.numpy()  # the same memory
        self.exit_layer = getattr(policy, "exit_layer", None) or view.num_layers
        self.layers_run = layers_run(view, self.exit_layer)
        self.running = True
        self.advance = getattr(view, "advance", None) or functools.partial(advance_in_parts, view)

    def run(self) -> Tensor:
        """Append tokens until the sequence has ended: (1, P + T)."""
        while self.running:
            before = self.stats.deep_passes
            self.step()
            self.stats.steps += 1
            self.show(final=self.stats.deep_passes > before)
            if not self.running:
                self.close()
        self.stream.end(self.ids)
        return self.ids

    @property
    def ids(self) -> Tensor:
        """(1, P + t) so far."""
        new = torch.tensor([self.tokens], dtype=torch.long, device="cpu")
        return torch.cat([self.given, new], dim=1)

    def show(self, *, final: bool) -> None:
        """Feed the streamer, if there is one."""
        if self.stream.streamer is not None:
            self.stream.show(self.ids, final=final)

    def step(self) -> None:
        """Decode one token."""
        hidden = self.view.embed(self.state, self.newest)
        _, logits = self.advance(self.state, hidden, 0, self.exit_layer)
        self.count(self.layers_run)
        self.stats.confidences.append([])
        self.append(int(logits.argmax()), self.exit_layer)

    def close(self) -> None:
        """Do what is left once the sequence has ended, which may make it go on."""

    def ask(
        self, measure: ConfidenceMeasure, hidden: Tensor, start: int, layer: int, threshold: float | None
    ) -> Answer:
        """Run layers `start`..`layer - 1` on the newest token and ask an exit there: for its token, if its
        confidence exceeds `threshold`, or if that is None."""
        if type(measure) is SoftmaxGap:
            hidden, logits = self.advance(self.state, hidden, start, layer)
            token, confidence = top_and_gap(logits)
            return Answer(hidden, confidence, token if threshold is None or confidence > threshold else None)
        hidden = self.view.run_layers(self.state, hidden, start, layer)
        states = self.view.read_exit(self.state, hidden, layer)[:, -1]
        measured = measure_states(measure, self.view, states, layer)
        confidence = measured.confidence.item()
        if threshold is not None and not confidence > threshold:
            return Answer(hidden, confidence, None)
        said = self.view.predict(states, layer) if measured.logits is None else measured.logits
        return Answer(hidden, confidence, int(read_logits(said[None])[0].argmax()))

    def count(self, layers: int, tokens: int = 1) -> None:
        """Note the work of so many layers, run one after the other on so many tokens at once."""
        self.stats.layer_calls += layers
        self.stats.layer_tokens += layers * tokens

    def append(self, token: int, layer: int) -> None:
        """Add a token that was chosen after `layer`."""
        self.tokens.append(token)
        self.newest_token[0, 0] = token
        self.stats.record_token([layer], [True])
        self.running = self.ends.go_on(token, self.given.shape[1] + len(self.tokens))


class GreedyCalm(GreedyDecoding[Calm]):
    """CALM: a token stops at the first layer that is sure of it, whose state the deeper ones' keys/values are
    made of."""

    def step(self) -> None:
        view, state, last = self.view, self.state, self.view.num_layers
        threshold, tests = self.policy.threshold.at(len(self.tokens)), []
        hidden, ran = view.embed(state, self.newest), 0
        for layer in filter(self.policy.tests, range(1, last)):
            hidden, confidence, token = self.ask(self.policy.confidence, hidden, ran, layer, threshold)
            ran = layer
            tests.append([confidence])
            if token is not None:
                view.write_kv(state, hidden, layer, last)
                break
        else:
            _, logits = self.advance(state, hidden, ran, last)
            ran, token = last, int(logits.argmax())
        self.stats.confidences.append(tests)
        self.count(ran)
        self.append(token, ran)


class GreedyFree(GreedyDecoding[Free]):
    """FREE: tokens that are sure stop at the exit and wait, until one that is not takes them along."""

    def __init__(self, call: Call, policy: Free, ends: HostCriteria) -> None:
        super().__init__(call, policy, ends)
        self.cached_before = self.state.lengths[0] + 1  # tokens, the first new one comes after them
        self.waiting: list[Answer] = []  # to tokens whose deep keys/values are still to come

    def step(self) -> None:
        policy, hidden = self.policy, self.view.embed(self.state, self.newest)
        threshold = policy.threshold.at(len(self.tokens))
        asked_at = threshold if policy.learner is None else None  # who learns compares all tokens
        answer = self.ask(policy.confidence, hidden, 0, self.exit_layer, asked_at)
        self.count(self.layers_run)
        self.stats.confidences.append([[answer.confidence]])
        self.waiting.append(answer._replace(hidden=answer.hidden.clone()))
        token, goes_on = answer.token, policy.must_catch_up(self.view, self.state, len(self.waiting))
        if token is None or goes_on or not answer.confidence > threshold:  # nor NaN
            self.catch_up(closing=False)
        else:
            self.append(token, self.exit_layer)

    def close(self) -> None:
        if self.waiting and self.policy.catches_up_at_end:
            self.catch_up(closing=True)
            self.show(final=True)

    def catch_up(self, *, closing: bool) -> None:
        """Run the deep layers for the W tokens that wait: the newest is not sure, unless the sequence is
        `closing`. Lossless, what the exit said to the others are drafts."""
        view, learner, window = self.view, self.policy.learner, self.waiting
        lossless, self.waiting = self.policy.lossless, []
        # Step 1. Exact deep states of all of them; nobody needs all logits but to compare.
        hidden = torch.cat([token.hidden for token in window], dim=1)  # (1, W, D)
        hidden = view.run_layers(self.state, hidden, self.exit_layer, view.num_layers)
        self.stats.deep_passes += 1
        self.count(view.num_layers - self.exit_layer, len(window))
        compared = hidden if lossless or learner is not None else hidden[:, -1:]
        said = read_logits(view.predict(compared, view.num_layers)).argmax(-1).tolist()
        # Step 2. Where exit and last layer agree, the threshold learns.
        if learner is not None and learner.counts(len(window)):
            self.teach(learner, window, said)
        # Step 3. The first draft that is not the deep model's token goes, with all after it.
        drafts = window[: None if closing else -1] if lossless else []
        right = next((at for at, draft in enumerate(drafts) if draft.token != said[at]), len(drafts))
        if right < len(drafts):
            self.take_back(len(drafts) - right)
        # Step 4. The deep model's token comes instead of it, or after the newest.
        if right < len(drafts) or not closing:
            self.append(said[right if lossless else -1], view.num_layers)

    def teach(self, learner: AdaptiveThreshold, window: list[Answer], said: list[int]) -> None:
        pairs = [(exit.confidence, exit.token == deep) for exit, deep in zip(window, said, strict=True)]
        learner.observe(pairs)
        self.stats.calibration += without_nan(pairs)

    def take_back(self, count: int) -> None:
        """Forget the newest tokens, with their keys/values: inputs up to the first one's predecessor stay."""
        del self.tokens[-count:]
        self.stats.take_back(count)
        self.stream.take_back(count)
        self.state.truncate(self.cached_before + len(self.tokens))
