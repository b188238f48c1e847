"""What one generation holds on the ONNX Runtime backend: buffers that sessions read and write in place.

B rows, H heads, W their width, N capacity, S source tokens, Q new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from onnxruntime import OrtValue
from torch import Tensor
from transformers import Cache

from models.backends.onnx.engine import Session
from models.backends.onnx.windows import Tables, Window, shared
from models.backends.shared import Pair, Shelf
from models.decoder_view import DecoderState
from models.families.stack import StackView

INITIAL_CAPACITY = 64


class Source(NamedTuple):
    """What cross-attention reads."""

    mask: OrtValue  # (B, S) int32, 0 at padding
    memory: list[tuple[OrtValue, OrtValue]]  # keys, values of each layer, (B, H, S, W)

    @property
    def pairs(self) -> list[Pair]:
        return [
            (torch.from_numpy(keys.numpy()), torch.from_numpy(values.numpy())) for keys, values in self.memory
        ]


@dataclass
class Numbering:
    """What depends on a capacity and on how tokens are numbered."""

    # Made so far, by the number of new tokens and whether they are attended to by group.
    windows: dict[tuple[int, bool], Window] = field(default_factory=dict)
    tables: Tables | None = None


class Buffers:
    """Keys/values of every layer, (B, H, N, W) each, and what is bound to them: they outlive a generation, as
    binding them anew takes longer than a token of a small model."""

    def __init__(
        self, batch: int, capacity: int, layers: int, heads: int, width: int, lodgers: dict[int, int]
    ) -> None:
        """`lodgers`: which of the last layers have none of their own, and with which others they lodge."""
        self.capacity = capacity
        self.bound_capacity = shared(np.array(capacity, np.int32))
        arrays = np.zeros((layers - len(lodgers), 2, batch, heads, capacity, width), np.float32)
        pairs = [(torch.from_numpy(keys), torch.from_numpy(values)) for keys, values in arrays]
        bound = [(shared(keys), shared(values)) for keys, values in arrays]
        hosts = [lodgers.get(index, index) for index in range(layers)]
        self.pairs: list[Pair] = [pairs[host] for host in hosts]
        self.bound = [bound[host] for host in hosts]
        self.numbering = Numbering()  # of prompts without padding
        # By first layer, the one after the last, and whether it is for prompts.
        self.segments: dict[tuple[int, int, bool], BoundSegment] = {}
        self.steps: dict[tuple[int, int], BoundStep] = {}  # by first layer and the one after the last


class OnnxState(DecoderState):
    """Of as many rows as its first tokens have, N growing."""

    buffers: Buffers
    source: Source | None = None  # of models that have an encoder
    prompt_length = 0  # of models without an encoder, where it is known
    exit_states: Tensor | None = None  # (B, Q, D) that an exit adapter made of the newest Q tokens

    def __init__(
        self, shelf: Shelf[Buffers], view: StackView, prompt_mask: Tensor | None, padding: Tensor | None
    ) -> None:
        """`padding`: (B, 1, 1, P) additive, where prompts are padded."""
        super().__init__(len(view.layers), prompt_mask)
        self.shelf = shelf
        self.num_layers = view.num_layers  # without that of an exit adapter
        self.padding = None if padding is None else padding.numpy()
        self.usual_positions = padding is None  # from 0 on
        self.capacity = 0
        self.own_numbering = Numbering()

    @property
    def numbering(self) -> Numbering:
        """That of usual positions outlives the generation."""
        return self.buffers.numbering if self.usual_positions else self.own_numbering

    def tables(self) -> Tables | None:
        """Of families that rotate queries and keys."""
        return None

    def reserve(self, batch: int, needed: int) -> None:
        """Make room for `needed` tokens in every layer: a power of two."""
        if needed <= self.capacity:
            return
        old = self.buffers.pairs if self.capacity else []
        self.capacity = max(INITIAL_CAPACITY, 1 << (needed - 1).bit_length())
        self.buffers = self.shelf.lend(self, batch, self.capacity)
        for grown, pair, held in zip(self.buffers.pairs, old, self.lengths, strict=False):
            for ours, before in zip(grown, pair, strict=True):
                ours[:, :, :held] = before[:, :, :held]
        self.own_numbering = Numbering()

    def continue_from(self, cache: Cache) -> None:
        """Take over the keys/values that a cache holds of each layer."""
        for index, layer in enumerate(cache.layers[: len(self.lengths)]):
            held = layer.get_seq_length()
            if held > 0:
                self.reserve(len(layer.keys), held + 1)
                self.write(index, layer.keys[:, :, :held], layer.values[:, :, :held])

    def held_by_all(self) -> list[Pair]:
        """Keys/values of the tokens that every layer holds; none if there are none."""
        held = min(self.lengths[: self.num_layers])
        pairs = self.buffers.pairs[: self.num_layers] if held > 0 else []
        return [(keys[:, :, :held], values[:, :, :held]) for keys, values in pairs]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append (B, H, Q, W) keys/values to those of a layer, for which there is room."""
        start = self.lengths[layer]
        stop = start + keys.shape[2]
        for buffer, new in zip(self.buffers.pairs[layer], (keys, values), strict=True):
            buffer[:, :, start:stop] = new
        self.lengths[layer] = stop


class BoundSegment:
    """Decoder layers with buffers bound to their inputs and outputs."""

    def __init__(self, session: Session, buffers: Buffers, layers: Sequence[int]) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.names = {node.name for node in session.get_inputs()}
        self.layers = layers
        self.branches = any(node.name == "exit_out" for node in session.get_outputs())
        self.window: Window | None = None
        self.source: Source | None = None
        self.binding.bind_ortvalue_input("capacity", buffers.bound_capacity)
        for layer in self.layers:
            for part, buffer in zip(("keys", "values"), buffers.bound[layer], strict=True):
                self.binding.bind_ortvalue_input(f"past_{part}.{layer}", buffer)
                self.binding.bind_ortvalue_output(f"written_{part}.{layer}", buffer)

    def run(self, hidden: Tensor, window: Window, source: Source | None) -> list[Tensor]:
        """(B, Q, D) states through the layers: what the last made, and the exit adapter of that if there is
        one."""
        self.run_in_place(hidden, window, source)
        # Policies keep states while the window is used again.
        return [output.clone() for output in window.outputs[: 1 + self.branches]]

    def run_in_place(self, hidden: Tensor, window: Window, source: Source | None) -> None:
        """`run` that leaves what it makes in the window's outputs."""
        if source is not None and source is not self.source:
            self._attend(source)
        if window is not self.window:
            self._move(window)
        window.hidden.copy_(hidden)
        self.session.run_with_iobinding(self.binding)

    def _attend(self, source: Source) -> None:
        self.binding.bind_ortvalue_input("source_mask", source.mask)
        for layer in self.layers:
            for part, memory in zip(("keys", "values"), source.memory[layer], strict=True):
                self.binding.bind_ortvalue_input(f"memory_{part}.{layer}", memory)
        self.source = source

    def _move(self, window: Window) -> None:
        for name in self.names & window.inputs.keys():
            self.binding.bind_ortvalue_input(name, window.inputs[name])
        for name, output in zip(
            ("hidden_out", "exit_out")[: 1 + self.branches], window.bound_outputs, strict=False
        ):
            self.binding.bind_ortvalue_output(name, output)
        self.window = window


class BoundStep:
    """Layers before an exit, or the last ones, on a lone token, and the head, which reads what they have made
    where they left it."""

    def __init__(self, segment: BoundSegment, head: Session) -> None:
        self.segment = segment
        self.head = head
        self.binding = head.io_binding()
        (output,) = head.get_outputs()
        self.logits = torch.empty(1, 1, output.shape[-1])
        self.row = self.logits.numpy()[0, 0]  # the same memory, (V,)
        self.binding.bind_ortvalue_output(output.name, shared(self.logits.numpy()))
        self.window: Window | None = None

    def run(self, hidden: Tensor, window: Window, source: Source | None) -> Tensor:
        """(1, 1, D) states -> those after the last layer, overwritten by the next run, as are `logits`."""
        self.segment.run_in_place(hidden, window, source)
        if window is not self.window:
            self.binding.bind_ortvalue_input("hidden", window.bound_outputs[self.segment.branches])
            self.window = window
        self.head.run_with_iobinding(self.binding)
        return window.outputs[0]
