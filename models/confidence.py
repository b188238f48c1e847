"""How sure an exit is of its prediction: the measures that policies compare with a threshold.

A measure maps normalized states (B, D) to confidences in [0, 1], together with the logits if it needed them.
A new measure is one more class with the same `__call__`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.decoder_view import DecoderView


class Measured(NamedTuple):
    confidence: Tensor  # (B,)
    logits: Tensor | None  # (B, V) where the measure computed them


class ConfidenceMeasure(Protocol):
    def __call__(self, view: DecoderView, normalized: Tensor) -> Measured:
        """Measure (B, D) normalized states."""


class SoftmaxGap:
    """Difference of the two largest probabilities (CALM, section 3.5, "softmax response")."""

    def __call__(self, view: DecoderView, normalized: Tensor) -> Measured:
        logits = view.project(normalized)
        return Measured(softmax_gap(logits), logits)


class MetaClassifier:
    """P(class 1) of a trained head, which saves the vocabulary projection where the token goes on."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, view: DecoderView, normalized: Tensor) -> Measured:
        return Measured(torch.softmax(self.head(normalized).float(), dim=-1)[:, 1], None)


def softmax_gap(logits: Tensor) -> Tensor:
    """Top-1 minus top-2 probability: (..., V) -> (...)."""
    top2 = torch.softmax(logits.float(), dim=-1).topk(2, dim=-1).values
    return top2[..., 0] - top2[..., 1]
