"""In which runs the tokens of a text wait for the deep layers while an exit is taught: how many drafts stand
behind a token is not known before decoding, so that they are drawn.

B rows, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST = 8
TYPICAL = 4
LONGER_ROWS = 1 / 8  # share of rows with runs of any length, as without a cap, or where all tokens exit


def typical_runs(lengths: Sequence[int]) -> Tensor:
    """Where the run begins that each token of rows of so many tokens belongs to, all alike: (B, T)."""
    return (torch.arange(max(lengths)) // TYPICAL * TYPICAL).repeat(len(lengths), 1)


def draw_runs(lengths: Sequence[int], generator: random.Random) -> Tensor:
    """The same of runs of random lengths."""
    starts = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(starts, lengths, strict=True):
        longest = length if generator.random() < LONGER_ROWS else LONGEST
        start = 0
        while start < length:
            stop = start + generator.randint(1, longest)
            row[start:stop] = start
            start = stop
    return starts
