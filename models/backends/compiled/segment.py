"""What is compiled: layers of a decoder as a function of tensors, over buffers of fixed size.

`segment(view, start, stop)` drives the unmodified layers. Keys/values are written in place at positions that
are a tensor, and every query looks at the whole buffer, behind a mask: one graph serves all positions.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backends.shared import GivenMemory, Pair
from models.families.encoder_decoder import EncoderDecoderView


class Given(NamedTuple):
    """What a segment reads besides the states of its window. B batch, H heads, W their width, N room for
    decoder tokens, S for source tokens."""

    buffers: list[Pair]  # (B, H, N, W) of each of its layers
    padding: Tensor  # (B, N) bool, true where a prompt is padded
    memory: list[Pair]  # (B, H, S, W) of each of its layers, what cross-attention makes of the source
    source_padding: Tensor  # (B, S) bool
    bias: Tensor | None  # (H, N) relative bias by distance, of families whose layers share one


Segment = Callable[[Tensor, Tensor, Given], Tensor]


def segment(view: EncoderDecoderView, start: int, stop: int) -> Segment:
    """Layers `start`..`stop - 1`: (B, Q, D) states, the position of the first one, and what is given, to
    (B, Q, D)."""

    def run(hidden: Tensor, position: Tensor, given: Given) -> Tensor:
        positions = position + torch.arange(hidden.shape[1], device=hidden.device)  # (Q,)
        keys = torch.arange(given.padding.shape[1], device=hidden.device)  # (N,)
        distance = positions[:, None] - keys  # (Q, N)
        # A token sees itself even where it is padding, lest a row of scores have no key at all.
        unseen = (distance < 0) | (given.padding[:, None, None] & (distance != 0))  # (B, 1, Q, N)
        mask, source_mask = additive(unseen, hidden), additive(given.source_padding[:, None, None], hidden)
        bias = None if given.bias is None else given.bias[:, distance.clamp(min=0)][None]  # (1, H, Q, N)
        inputs = view.layer_inputs(hidden, mask, source_mask, bias)
        return view.apply_layers(hidden, inputs, SegmentCache(start, given, positions), start, stop)

    # Torch counts compilations by code object, up to a limit: each segment has one of its own.
    return types.FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)


def additive(unseen: Tensor, like: Tensor) -> Tensor:
    """The smallest number of the type of `like` where a key is not seen, else 0."""
    return torch.zeros_like(unseen, dtype=like.dtype).masked_fill(unseen, torch.finfo(like.dtype).min)


class SegmentCache(GivenMemory):
    """The cache that layers see: buffers to write into, and memory that they need not make again."""

    def __init__(self, start: int, given: Given, positions: Tensor) -> None:
        memory = {start + index: pair for index, pair in enumerate(given.memory)}
        super().__init__(WrittenBuffers(start, given.buffers, positions), memory)
        self.position = positions[0]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """A tensor: UMT5's layers compute their relative biases from it."""
        return self.position


class WrittenBuffers:
    """Under Hugging Face's cache interface: buffers whose rows at `positions` (Q,) layers write."""

    def __init__(self, start: int, buffers: list[Pair], positions: Tensor) -> None:
        self.start = start
        self.buffers = buffers
        self.positions = positions

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Pair:
        held = self.buffers[layer - self.start]
        for buffer, new in zip(held, (keys, values), strict=True):
            buffer.index_copy_(2, self.positions, new)
        return held
