"""Drafts copied from the text itself: what followed the newest tokens where they stood before.

Summaries, answers and edits repeat their prompt. A repeated passage needs no model to be drafted (prompt
lookup decoding: Saxena, 2023), only one to be verified: `Free(..., lookup=PromptLookup(6))` runs its shallow
layers on a whole proposal at once, goes on with its exit from there, and lets the parallel pass judge it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.checks import as_count
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


def check_lookup(name: str, batch_size: int) -> None:
    """Raise UserError where policy `name` cannot decode a batch of that size with a lookup."""
    if batch_size > 1:
        raise UserError(f"{name} with a lookup decodes one sequence at a time: each row has its own text.")
