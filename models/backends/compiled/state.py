"""What one generation holds on the compile backend: keys/values in tensors of fixed size that outlive it.

CUDA graphs know tensors by their address: they come from the view's `Shelf`, and go back to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.backends.shared import Pair, Shelf
from models.decoder_view import DecoderState
from models.families.encoder_decoder import EncoderDecoderView

INITIAL_CAPACITY = 128
SOURCE_STEP = 64


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


def make_held(view: EncoderDecoderView, batch: int, capacity: int) -> Held:
    """Empty ones, at addresses that stay."""
    heads, width = view.key_value_shape
    weight = view.model.get_output_embeddings().weight
    with torch.inference_mode(False):  # lest they can be written in that mode only
        shape = (batch, heads, capacity, width)
        pairs = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(view.num_layers)]
        made = Held(pairs, weight.new_empty((batch, capacity), dtype=torch.bool))
    for tensor in made.tensors():
        torch._dynamo.mark_static_address(tensor)
    return made


class CompiledState(DecoderState):
    """Of B rows and S source tokens."""

    def __init__(self, shelf: Shelf[Held], layers: int, batch: int, source_length: int) -> None:
        super().__init__(layers)
        self.shelf = shelf
        self.batch = batch
        self.source_length = source_length
        # Multiples, lest every length compile anew.
        self.memory = self._lend(-(-source_length // SOURCE_STEP) * SOURCE_STEP)
        self.memory.padding[:, source_length:] = True
        self.buffers = self._lend(INITIAL_CAPACITY)

    def reserve(self, needed: int) -> None:
        """Make room for `needed` tokens in every layer: a power of two."""
        if needed <= self.buffers.capacity:
            return
        old, capacity = self.buffers, 1 << (needed - 1).bit_length()
        self.buffers = self._lend(capacity)
        self.buffers.padding[:, : old.capacity] = old.padding
        for layer, held in enumerate(self.lengths):
            keys, values = old.pairs[layer]
            self.buffers.write(layer, 0, keys[:, :, :held], values[:, :, :held])

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append (B, H, Q, W) keys/values to those of a layer."""
        start = self.lengths[layer]
        self.reserve(start + keys.shape[2])
        self.buffers.write(layer, start, keys, values)
        self.lengths[layer] = start + keys.shape[2]

    def _lend(self, capacity: int) -> Held:
        held = self.shelf.lend(self, self.batch, capacity)
        held.clear()
        return held
