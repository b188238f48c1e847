"""Drafts copied from the text itself: what followed the newest tokens where they stood before.

Summaries, answers and edits repeat their prompt. A repeated passage needs no model to be drafted (prompt
lookup decoding: Saxena, 2023), only one to be verified: `Free(..., lookup=PromptLookup(6))` runs its shallow
layers on a whole proposal at once and lets the parallel pass judge it. Where it finds none, its exit drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from models.checks import as_count
from models.decoder_view import DecoderState, DecoderView
from models.errors import UserError


@dataclass(frozen=True)
class PromptLookup:
    """Proposes up to `tokens` tokens: those after the newest earlier occurrence of the last `longest` tokens,
    or else of fewer, at least `shortest`. Single tokens, which Hugging Face's `prompt_lookup_num_tokens`
    follows, too, cost more in rejected proposals than they bring.

    Raises:
        UserError: no tokens to propose or to look for.
    """

    tokens: int
    longest: int = 3
    shortest: int = 2

    def __post_init__(self) -> None:
        for name in ("tokens", "longest", "shortest"):
            as_count(f"PromptLookup: {name}", getattr(self, name))
        if self.shortest > self.longest:
            raise UserError(f"PromptLookup: shortest {self.shortest} must not exceed longest {self.longest}.")

    def propose(self, text: Tensor, most: int) -> Tensor:
        """Continue (1, T) ids: (1, m) ids, m at most `most` and `tokens`, 0 where nothing occurred before."""
        count = min(most, self.tokens)
        start = self._find(text[0].numpy(force=True)) if count > 0 else None
        return text[:, :0] if start is None else text[:, start : start + count]

    def _find(self, ids: np.ndarray) -> int | None:
        """Where what followed the newest tokens begins."""
        for length in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            earlier = np.lib.stride_tricks.sliding_window_view(ids[:-1], length)
            places = np.flatnonzero((earlier == ids[-length:]).all(axis=1))
            if len(places):
                return int(places[-1]) + length
        return None


class Proposer(Protocol):
    """A policy that looks up what may come next."""

    def propose(self, state: DecoderState, text: Tensor) -> Tensor:
        """What may follow (1, T) ids: (1, m) ids, m = 0 for nothing."""


def proposer_of(policy: Any) -> Proposer | None:
    return policy if getattr(policy, "lookup", None) is not None else None


def as_lookup(name: str, value: Any) -> PromptLookup | None:
    """`value`; UserError if it is neither a lookup nor None."""
    if value is not None and not isinstance(value, PromptLookup):
        raise UserError(f"{name} must be an object such as PromptLookup(6), got {value!r}.")
    return value


def check_lookup(name: str, batch_size: int) -> None:
    """Raise UserError where policy `name` cannot decode a batch of that size with a lookup."""
    if batch_size > 1:
        raise UserError(f"{name} with a lookup decodes one sequence at a time: each row has its own text.")


def check_text(proposer: Proposer | None, view: DecoderView, given: Tensor | None) -> None:
    """Raise UserError where the text (1, S) that a lookup reads before prompt and output does not fit."""
    config = view.model.config
    if proposer is None:
        if given is not None:
            raise UserError("lookup_ids has no effect here: the policy has no lookup.")
        return
    if not getattr(config, "share_encoder_decoder_embeddings", True):  # of Marian
        raise UserError("Source and target have vocabularies of their own: leave the lookup out.")
    if given is None:
        if config.is_encoder_decoder:
            raise UserError(
                "A lookup reads what the encoder reads: give lookup_ids=, the source's token ids."
            )
        return
    if given.dim() != 2 or len(given) != 1 or not given.numel() or given.is_floating_point():
        shape = (*given.shape,)
        raise UserError(f"lookup_ids must be the (1, S) ids of a text, got {given.dtype} of shape {shape}.")
    if not 0 <= int(given.min()) <= int(given.max()) < vocabulary_of(view):
        raise UserError("lookup_ids are of another vocabulary than the decoder's: leave the lookup out.")


def vocabulary_of(view: DecoderView) -> int:
    return view.model.get_output_embeddings().weight.shape[0]
