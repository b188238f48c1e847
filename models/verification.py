"""What a parallel pass of FREE says to the shallow tokens before it: keep them, or take them back.

`Rollback` is the original's: the deep model finds a token too unlikely. `Drafting` makes shallow tokens, or
what a lookup proposed, drafts of speculative decoding; the loop, which knows processors and sampling, gives
the verdict.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.exit_policy import Drafts, StepResult
from models.host import argmax


class WindowToken(NamedTuple):
    """A token of the parallel window: one that waits for its deep keys/values, as it exited or as a lookup
    proposed what follows it; or the newest one: if it is unsure, all of them run the deep layers."""

    hidden: Tensor  # (B, 1, D) un-normalized output of the shallow layers
    confidence: list[float]  # (B,) of the exit; empty where it was not asked
    sure: list[bool]  # (B,) whether it exits
    active: list[bool]  # (B,) which rows were unfinished
    logits: Tensor | None  # (B, V), kept only where a deep pass will compare them
    proposed: bool = False  # whether a lookup says what follows, not the exit
    exits: bool = False  # whether the exit, too, would have said what it proposes

    @property
    def predicted(self) -> Tensor:
        """The exit's own tokens, which a deep pass compares: (B,)."""
        assert self.logits is not None
        return argmax(self.logits)


class Verification(Protocol):
    def judge(
        self, exited: list[WindowToken], deep_logits: Tensor, result: StepResult, *, closing: bool
    ) -> None:
        """Note in `result` what becomes of the n tokens that exited; `deep_logits` (B, W, V), W >= n.

        `closing`: the sequence has ended, and no token of its own needed the deep layers.
        """


class Drafting:
    """The tokens are drafts, to be accepted or rejected: by the deep model (lossless), or, where an exit is
    `trusted`, named by its layer, by that wherever it was sure: then only lookups are in question."""

    def __init__(self, trusted: int | None = None) -> None:
        self.trusted = trusted

    def judge(
        self, exited: list[WindowToken], deep_logits: Tensor, result: StepResult, *, closing: bool
    ) -> None:
        if not exited or (self.trusted is not None and not any(token.proposed for token in exited)):
            return
        logits, layers = deep_logits[:, : len(exited)], [result.exit_layers] * len(exited)
        if self.trusted is not None:
            logits = logits.clone()
            for index, token in enumerate(exited):
                if token.sure[0]:
                    assert token.logits is not None
                    logits[:, index], layers[index] = token.logits, [self.trusted]
        result.drafts = Drafts(logits, [token.active for token in exited], layers)


class Rollback:
    """Take back the first token that is too unlikely under the deep model, and all after it, while the
    sequence goes on; batch 1."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold  # of the cross-entropy, in nats

    def judge(
        self, exited: list[WindowToken], deep_logits: Tensor, result: StepResult, *, closing: bool
    ) -> None:
        if not exited or closing:  # a finished sequence stands
            return
        # Step 1. Cross-entropy of each shallow token under the deep model.
        shallow = torch.cat([token.predicted for token in exited])  # (n,)
        surprise = F.cross_entropy(deep_logits[0, : len(exited)].float(), shallow, reduction="none")
        wrong = (surprise > self.threshold).tolist()
        # Step 2. From the first that exceeds the threshold on, tokens go; the deep logits there choose anew.
        if any(wrong):
            first = wrong.index(True)
            result.retract = len(exited) - first
            result.logits = deep_logits[:, first]
