"""What is compiled: layers of a decoder as a function of tensors, over buffers of fixed size.

`segment(view, start, stop, make_inputs)` drives the unmodified layers. Keys/values are written in place at
positions that are a tensor, and every query looks at the whole buffer, behind a mask: one graph serves all
positions.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.backends.shared import GivenMemory, Pair
from models.families.masks import smallest
from models.families.stack import StackView


class Source(NamedTuple):
    """What cross-attention reads. B batch, H heads, W their width, S room for source tokens."""

    memory: list[Pair]  # (B, H, S, W) of each of a segment's layers
    padding: Tensor  # (B, S) bool


class Given(NamedTuple):
    """What a segment reads besides the states of its window. N room for tokens, others see `Source`."""

    buffers: list[Pair]  # (B, H, N, W) of each of its layers
    padding: Tensor  # (B, N) bool, true where a prompt is padded
    source: Source | None = None  # of models that have an encoder
    bias: Tensor | None = None  # (H, N) relative bias by distance, of families whose layers share one
    # (B or 1, N, W) cosines, sines by kind of layer, where layers rotate
    tables: dict[str, Pair] | None = None

    def up_to(self, length: int, *, alike: bool) -> Given:
        """The same with room for no more than `length` tokens, of rows that are padded alike, or not."""
        buffers = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.buffers]
        return self._replace(buffers=buffers, padding=self.padding[: 1 if alike else None, :length])


class Window(NamedTuple):
    """Q tokens of a segment's call."""

    hidden: Tensor  # (B, Q, D)
    positions: Tensor  # (Q,)
    distance: Tensor  # (Q, N) of each key before its query
    unseen: Tensor  # (B, 1, Q, N) bool, where a query must not look


Segment = Callable[[Tensor, Tensor, Given], Tensor]
InputsOf = Callable[[Any, Window, Given], dict[str, Any]]  # what layers of a view are called with


def segment(view: StackView, start: int, stop: int, make_inputs: InputsOf) -> Segment:
    """Layers `start`..`stop - 1`: (B, Q, D) states, the position of the first one, and what is given, to
    (B, Q, D)."""

    def run(hidden: Tensor, position: Tensor, given: Given) -> Tensor:
        positions = position + torch.arange(hidden.shape[1], device=hidden.device)
        keys = torch.arange(given.padding.shape[1], device=hidden.device)
        distance = positions[:, None] - keys
        # A token sees itself even where it is padding, lest a row of scores have no key at all.
        unseen = (distance < 0) | (given.padding[:, None, None] & (distance != 0))
        inputs = make_inputs(view, Window(hidden, positions, distance, unseen), given)
        own = WrittenBuffers(start, given.buffers, positions)
        cache = own if given.source is None else SegmentCache(start, own, given.source)
        return view.apply_layers(hidden, inputs, cache, start, stop)

    # Torch counts compilations by code object, up to a limit: each segment has one of its own.
    return types.FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)


def additive(unseen: Tensor, like: Tensor) -> Tensor:
    """What hides a key, typed as `like`, where it is not seen, else 0."""
    return torch.zeros_like(unseen, dtype=like.dtype).masked_fill(unseen, smallest(like.dtype))


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


class SegmentCache(GivenMemory):
    """The cache that layers with cross-attention see: buffers to write into, and memory that they need not
    make again."""

    def __init__(self, start: int, own: WrittenBuffers, source: Source) -> None:
        super().__init__(own, {start + index: pair for index, pair in enumerate(source.memory)})
        self.position = own.positions[0]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """A tensor: UMT5's layers compute their relative biases from it."""
        return self.position
