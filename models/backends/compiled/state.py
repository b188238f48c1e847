"""What one generation holds on the compile backend: keys/values in tensors of fixed size that outlive it.

CUDA graphs know tensors by their address: they come from the view's `Shelf`, and go back to it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import Cache

from models.backends.shared import Pair, Shelf
from models.decoder_view import DecoderState
from models.families.stack import StackView

INITIAL_CAPACITY = 128


class Held:
    """Keys/values (B, H, N, W) of every layer, and which of the N tokens are padding: (B, N) bool."""

    def __init__(self, pairs: list[Pair], padding: Tensor) -> None:
        self.pairs = pairs
        self.padding = padding

    @property
    def capacity(self) -> int:
        return self.padding.shape[1]

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put (B, H, Q, W) keys/values of a layer to positions `start`..`start + Q - 1`."""
        for buffer, new in zip(self.pairs[layer], (keys, values), strict=True):
            buffer[:, :, start : start + new.shape[2]] = new

    def clear(self) -> None:
        """A mask does not hide what is not finite, and an overflow may have left such."""
        for tensor in self.tensors():
            tensor.zero_()

    def tensors(self) -> list[Tensor]:
        return [self.padding, *(tensor for pair in self.pairs for tensor in pair)]


def make_held(view: StackView, batch: int, capacity: int) -> Held:
    """Empty ones, at addresses that stay."""
    heads, width = view.key_value_shape
    weight = view.model.get_output_embeddings().weight
    layers = range(len(view.layers))
    with torch.inference_mode(False):  # lest they can be written in that mode only
        shape = (batch, heads, capacity, width)
        own = {
            index: (weight.new_empty(shape), weight.new_empty(shape))
            for index in layers
            if index not in view.lodgers
        }
        pairs = [own[view.lodgers.get(index, index)] for index in layers]
        made = Held(pairs, weight.new_empty((batch, capacity), dtype=torch.bool))
    for tensor in made.tensors():
        torch._dynamo.mark_static_address(tensor)
    return made


class CompiledState(DecoderState):
    """Of as many rows as its first tokens have, N growing."""

    buffers: Held  # once there are tokens

    def __init__(
        self, shelf: Shelf[Held], layers: int, prompt_mask: Tensor | None, padding: Tensor | None
    ) -> None:
        """`padding`: (B, 1, 1, P) additive, where prompts are padded."""
        super().__init__(layers, prompt_mask)
        self.shelf = shelf
        self.padded = None if padding is None else padding[:, 0, 0] != 0  # (B, P)
        self.capacity = 0

    def reserve(self, batch: int, needed: int) -> None:
        """Make room for `needed` tokens in every layer: a power of two."""
        if needed <= self.capacity:
            return
        old = self.buffers.pairs if self.capacity else []
        self.capacity = max(INITIAL_CAPACITY, 1 << (needed - 1).bit_length())
        self.buffers = self.lend(batch, self.capacity)
        if self.padded is not None:
            self.buffers.padding[:, : self.padded.shape[1]] = self.padded[:, : self.capacity]
        for layer, (keys, values) in enumerate(old):
            held = self.lengths[layer]
            self.buffers.write(layer, 0, keys[:, :, :held], values[:, :, :held])

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append (B, H, Q, W) keys/values to those of a layer."""
        start = self.lengths[layer]
        self.reserve(len(keys), start + keys.shape[2])
        self.buffers.write(layer, start, keys, values)
        self.lengths[layer] = start + keys.shape[2]

    def continue_from(self, cache: Cache) -> None:
        """Take over the keys/values that a cache holds of each layer."""
        for index, layer in enumerate(cache.layers[: len(self.lengths)]):
            held = layer.get_seq_length()
            if held > 0:
                self.write(index, layer.keys[:, :, :held], layer.values[:, :, :held])

    def held_by_all(self, layers: int) -> Iterable[Pair]:
        """Keys/values of the tokens that each of the first `layers` holds; none if there are none."""
        held = min(self.lengths[:layers])
        pairs = self.buffers.pairs[:layers] if held > 0 else []
        return ((keys[:, :, :held], values[:, :, :held]) for keys, values in pairs)

    def lend(self, batch: int, capacity: int) -> Held:
        held = self.shelf.lend(self, batch, capacity)
        held.clear()
        return held
