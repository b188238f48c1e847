"""How sure an exit is of its prediction: the measures that policies compare with a threshold.

A measure maps the states (B, D) of an exit to confidences in [0, 1], together with the logits if it needed
them.
A new measure is one more class with the same `__call__`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.checks import spell
from models.decoder_view import DecoderView
from models.errors import UserError
from models.exit_adapter import check_shortlist
from models.host import argmax, top_and_gap


class Measured(NamedTuple):
    confidence: Tensor  # (B,)
    logits: Tensor | None  # (B, V) where the measure computed them


class ConfidenceMeasure(Protocol):
    def __call__(self, view: DecoderView, hidden: Tensor, layer: int) -> Measured:
        """Measure (B, D) un-normalized states after `layer`."""


def measure_states(measure: ConfidenceMeasure, view: DecoderView, hidden: Tensor, layer: int) -> Measured:
    """What a measure says of (B, D) states, as a `Measured` also where it gives another pair.

    Raises:
        UserError: confidences that are no tensor of B numbers, or logits that are none of B rows.
    """
    measured: Any = measure(view, hidden, layer)
    if isinstance(measured, tuple | list) and len(measured) == 2:
        confidence, logits = measured
        if is_of_rows(confidence, len(hidden), 1) and (logits is None or is_of_rows(logits, len(hidden), 2)):
            return Measured(confidence, logits)
    name = getattr(measure, "__name__", type(measure).__name__)
    raise UserError(
        f"confidence: {name} must return Measured(confidence, logits), tensors of shape "
        f"({len(hidden)},) and ({len(hidden)}, V) or None for {len(hidden)} rows, got {spell(measured)}."
    )


def is_of_rows(value: Any, rows: int, dimensions: int) -> bool:
    """Whether `value` is a tensor with so many rows and dimensions."""
    return isinstance(value, Tensor) and value.dim() == dimensions and len(value) == rows


class SoftmaxGap:
    """Difference of the two largest probabilities (CALM, section 3.5, "softmax response")."""

    def __call__(self, view: DecoderView, hidden: Tensor, layer: int) -> Measured:
        logits = view.predict(hidden, layer)
        return Measured(softmax_gap(logits), logits)


class ShortlistGap:
    """The softmax gap over a few candidate tokens: a smaller projection wherever the token goes on.

    What other tokens would have taken of the probability is missing, so that confidences are higher than
    `SoftmaxGap`'s: thresholds do not carry over. The token itself is always chosen from all.
    """

    def __init__(self, view: DecoderView, token_ids: Tensor) -> None:
        """`token_ids`: (K,) distinct candidates, K at least 2.

        Raises:
            UserError: fewer, one twice, or one that is no token.
        """
        check_shortlist(token_ids, view.model.get_output_embeddings().weight.shape[0], least=2)
        self.project = view.projection_onto(token_ids)

    def __call__(self, view: DecoderView, hidden: Tensor, layer: int) -> Measured:
        return Measured(softmax_gap(self.project(view.normalize(hidden, layer))), None)


class MetaClassifier:
    """P(class 1) of a trained head, which saves the vocabulary projection where the token goes on."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, view: DecoderView, hidden: Tensor, layer: int) -> Measured:
        scores = self.head(view.normalize(hidden, layer))  # (B, 2)
        return Measured(torch.softmax(scores.float(), dim=-1)[:, 1], None)


def softmax_gap(logits: Tensor) -> Tensor:
    """Top-1 minus top-2 probability: (..., V) -> (...)."""
    logits = logits.float()
    if logits.device.type == "cpu":
        rows = logits.detach().reshape(-1, logits.shape[-1]).numpy()
        gaps = [top_and_gap(row)[1] for row in rows]
        return torch.tensor(gaps, dtype=torch.float32, device="cpu").view(logits.shape[:-1])
    shares = torch.softmax(logits, dim=-1)
    place = argmax(shares).unsqueeze(-1)
    others = shares.scatter(-1, place, -1.0)
    return shares.gather(-1, place).squeeze(-1) - others.amax(-1)
