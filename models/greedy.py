"""One sequence decoded greedily, where nobody but the model has a say: the commonest call, at its fastest.

A small model runs several layers in the time of a dozen operators of torch. `GreedyDecoding` decodes and
counts what `models.decoding.Decoding` does, with tokens as numbers.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from models.confidence import SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoder_view import DecoderState, DecoderView, advance_in_parts
from models.exit_policy import ExitPolicy, FullDepth, StaticExit, layers_run
from models.free import Free
from models.host import top_and_gap
from models.token_choice import HostCriteria, TokenChooser
from models.verification import Rollback


def greedy_decoding(
    view: DecoderView,
    state: DecoderState,
    policy: ExitPolicy,
    chooser: TokenChooser,
    stats: DecodeStats,
    input_ids: Tensor,
) -> GreedyDecoding | None:
    """That of (B, P) ids; None where tokens are not simply a single sequence's most probable ones, ids not on
    the CPU, or the policy is none that `knows` says yes to."""
    alone = len(input_ids) == 1 and input_ids.device.type == "cpu" and state.prompt_embeds is None
    if not (alone and chooser.takes_the_most_probable and chooser.ends is not None and knows(policy)):
        return None
    if isinstance(policy, Free):
        return GreedyFree(view, state, policy, chooser.ends, stats, input_ids)
    return GreedyDecoding(view, state, policy, chooser.ends, stats, input_ids)


def knows(policy: ExitPolicy) -> bool:
    """Full depth, Static-Exiting, and FREE by the softmax gap, lossless or not, where nothing is looked up or
    learnt. Classes made of them may do anything."""
    if type(policy) is Free:
        parallel = policy.causal_catch_up and not policy.copy_skipped
        fixed = policy.learner is None and type(policy.confidence) is SoftmaxGap
        return parallel and fixed and policy.lookup is None and not isinstance(policy.verification, Rollback)
    return type(policy) is StaticExit or (type(policy) is FullDepth and policy.lookup is None)


class GreedyDecoding:
    """One `generate` call under way in which all tokens run the same layers. D width, V vocabulary."""

    def __init__(
        self,
        view: DecoderView,
        state: DecoderState,
        policy: ExitPolicy,
        ends: HostCriteria,
        stats: DecodeStats,
        input_ids: Tensor,
    ) -> None:
        self.view = view
        self.state = state
        self.ends = ends
        self.stats = stats
        self.given = input_ids  # (1, P)
        self.tokens: list[int] = []  # new ones
        self.newest = input_ids[:, -1:].clone()  # (1, 1), not cached yet
        self.newest_token = self.newest.numpy()  # the same memory
        self.exit_layer = getattr(policy, "exit_layer", None) or view.num_layers
        self.layers_run = layers_run(view, self.exit_layer)
        self.running = True
        self.run_newest = getattr(view, "advance", None) or functools.partial(advance_in_parts, view)

    def run(self) -> Tensor:
        """Append tokens until the sequence has ended: (1, P + T)."""
        while self.running:
            self.step()
            self.stats.steps += 1
            if not self.running:
                self.close()
        return torch.cat([self.given, self.given.new_tensor([self.tokens])], dim=1)

    def step(self) -> None:
        """Decode one token."""
        _, logits = self.advance()
        self.stats.confidences.append([])
        self.append(int(logits.argmax()), self.exit_layer)

    def close(self) -> None:
        """Do what is left once the sequence has ended, which may make it go on."""

    def advance(self) -> tuple[Tensor, np.ndarray]:
        """Run the newest token up to the exit: its states (1, 1, D), and what the exit says, (V,), until the
        next one does."""
        self.stats.layer_calls += self.layers_run
        self.stats.layer_tokens += self.layers_run
        return self.run_newest(self.state, self.newest, self.exit_layer)

    def append(self, token: int, layer: int) -> None:
        """Add a token that was chosen after `layer`."""
        self.tokens.append(token)
        self.newest_token[0, 0] = token
        self.stats.record_token([layer], [True])
        self.running = self.ends.go_on(token, self.given.shape[1] + len(self.tokens))


class GreedyFree(GreedyDecoding):
    """FREE: tokens that are sure stop at the exit and wait, until one that is not takes them along."""

    def __init__(
        self,
        view: DecoderView,
        state: DecoderState,
        policy: Free,
        ends: HostCriteria,
        stats: DecodeStats,
        input_ids: Tensor,
    ) -> None:
        super().__init__(view, state, policy, ends, stats, input_ids)
        self.policy = policy
        self.cached_before = state.lengths[0] + 1  # tokens, the first new one comes after them
        self.waiting: list[Tensor] = []  # (1, 1, D) states after the exit's layer

    def step(self) -> None:
        hidden, logits = self.advance()
        token, confidence = top_and_gap(logits)
        self.stats.confidences.append([[confidence]])
        sure = confidence > self.policy.threshold.at(len(self.tokens))
        self.waiting.append(hidden.clone())
        if sure and not self.policy.must_catch_up(self.view, self.state, len(self.waiting)):
            self.append(token, self.exit_layer)
        else:
            self.catch_up(self.tokens[len(self.tokens) + 1 - len(self.waiting) :], closing=False)

    def close(self) -> None:
        if self.policy.lossless and self.waiting:
            self.catch_up(self.tokens[-len(self.waiting) :], closing=True)

    def catch_up(self, drafts: list[int], *, closing: bool) -> None:
        """Run the deep layers for the W tokens that wait. Lossless, `drafts` are what the exit said to them,
        all of them or, unless `closing`, all but the newest, which is not sure."""
        view, deep = self.view, self.view.num_layers - self.exit_layer
        # Step 1. Exact deep states of all of them.
        hidden = torch.cat(self.waiting, dim=1)  # (1, W, D)
        hidden = view.run_layers(self.state, hidden, self.exit_layer, view.num_layers)
        self.stats.deep_passes += 1
        self.stats.layer_calls += deep
        self.stats.layer_tokens += deep * len(self.waiting)
        self.waiting = []
        # Step 2. The first draft that is not the deep model's token goes, with all after it.
        if not self.policy.lossless:
            drafts, hidden = [], hidden[:, -1:]
        said = view.predict(hidden, view.num_layers)[0].float().numpy().argmax(-1).tolist()
        right = next((at for at, draft in enumerate(drafts) if said[at] != draft), len(drafts))
        if right < len(drafts):
            self.take_back(len(drafts) - right)
        # Step 3. The deep model's token comes instead of it, or after the newest.
        if right < len(drafts) or not closing:
            self.append(said[right], view.num_layers)

    def take_back(self, count: int) -> None:
        """Forget the newest tokens, with their keys/values: inputs up to the first one's predecessor stay."""
        del self.tokens[-count:]
        self.stats.take_back(count)
        self.state.truncate(self.cached_before + len(self.tokens))
