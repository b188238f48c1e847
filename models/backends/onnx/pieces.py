"""The parts that a model is exported in, as modules to be traced: layer by layer, over the stock modules.

A piece says what it reads and writes, under which names, and which axes vary; `models.backends.onnx.tracing`
traces one of each kind. B batch, Q new tokens,
S source tokens, N capacity of the key/value buffers, D model width, H heads, W their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.backends.onnx.attention import ATTENDED, Attended, ExportCache

BATCH, NEW, SOURCE, CAPACITY = 2, 3, 7, 11  # sizes of the traced examples
FLOAT, INT = torch.float32, torch.int32
Axes = dict[int, str]


class Piece(nn.Module):
    """A module that is traced with `examples` and computes outputs named `outputs`."""

    inputs: dict[str, tuple[Tensor, Axes]]  # example and varying axes of each argument, in order
    outputs: tuple[str, ...]

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def hidden_example(width: int, tokens: str = "new") -> tuple[Tensor, Axes]:
    return torch.zeros(BATCH, NEW if tokens == "new" else SOURCE, width), {0: "batch", 1: tokens}


def keys_example(heads: int, length: int, width: int, axis: str) -> tuple[Tensor, Axes]:
    """A tensor of its own each time: the exporter takes one object for one input."""
    return torch.zeros(BATCH, heads, length, width), {0: "batch", 2: axis}


class DecoderLayer(Piece):
    """Layer `index` of a decoder, which appends keys/values to its buffers."""

    outputs = ("hidden_out", "written_keys", "written_values")

    def __init__(self, view: Any, index: int) -> None:
        super().__init__(view.layers[index])
        self.view, self.index = view, index
        heads, width = view.key_value_shape
        self.inputs = {
            "hidden": hidden_example(view.width),
            "bias": (torch.zeros(1, heads, NEW, CAPACITY), {2: "new", 3: "capacity"}),
            "last": (torch.zeros(BATCH, dtype=INT), {0: "batch"}),
            "capacity": (torch.tensor(CAPACITY, dtype=INT), {}),
            "row_count": (torch.zeros(BATCH, dtype=INT), {0: "batch"}),
            "past_keys": keys_example(heads, CAPACITY, width, "capacity"),
            "past_values": keys_example(heads, CAPACITY, width, "capacity"),
        }
        if view.has_memory:
            self.inputs |= {
                "source_mask": (torch.ones(BATCH, SOURCE, dtype=INT), {0: "batch", 1: "source"}),
                "memory_keys": keys_example(heads, SOURCE, width, "source"),
                "memory_values": keys_example(heads, SOURCE, width, "source"),
            }

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor,
        last: Tensor,
        capacity: Tensor,
        row_count: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        source_mask: Tensor | None = None,
        memory_keys: Tensor | None = None,
        memory_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        memory = None if memory_keys is None or memory_values is None else (memory_keys, memory_values)
        attended = Attended(source_mask, memory, (past_keys, past_values), bias, last, capacity, row_count)
        token = ATTENDED.set(attended)
        cache = ExportCache(self.index, memory)
        hidden = self.view.apply_layers(
            hidden, self.view.traced_inputs(hidden), cache, self.index, self.index + 1
        )
        ATTENDED.reset(token)
        keys, values = attended.written
        return hidden, keys, values


class EncoderLayer(Piece):
    """Layer `index` of an encoder."""

    outputs = ("hidden_out",)

    def __init__(self, view: Any, index: int) -> None:
        super().__init__(view.encoder_layers[index])
        self.view = view
        heads = view.encoder_heads
        self.inputs = {
            "hidden": hidden_example(view.width, "source"),
            "source_mask": (torch.ones(BATCH, SOURCE, dtype=INT), {0: "batch", 1: "source"}),
            "bias": (torch.zeros(1, heads, SOURCE, SOURCE), {2: "source", 3: "source"}),
        }

    def forward(self, hidden: Tensor, source_mask: Tensor, bias: Tensor) -> Tensor:
        token = ATTENDED.set(Attended(source_mask, bias=bias))
        hidden = self.view.apply_encoder_layer(self.layer, hidden)
        ATTENDED.reset(token)
        return hidden


class Memory(Piece):
    """Keys and values that the cross-attention of one decoder layer makes of the source."""

    outputs = ("memory_keys", "memory_values")

    def __init__(self, view: Any, index: int) -> None:
        super().__init__(view.layers[index])
        self.view = view
        self.inputs = {"hidden": hidden_example(view.width, "source")}

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.view.project_memory(self.layer, hidden)


class KeysValues(Piece):
    """Keys and values that the self-attention of one decoder layer makes of its input, without running it."""

    outputs = ("keys", "values")

    def __init__(self, view: Any, index: int) -> None:
        super().__init__(view.layers[index])
        self.view = view
        self.inputs = {"hidden": hidden_example(view.width)}

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.view.project_kv(self.layer, hidden)


class Head(Piece):
    """Logits of the exit after `layer`, from un-normalized states."""

    outputs = ("logits",)

    def __init__(self, view: Any, layer: int) -> None:
        super().__init__(view.model)
        self.view, self.exit = view, layer
        self.inputs = {"hidden": hidden_example(view.width)}

    def forward(self, hidden: Tensor) -> Tensor:
        return self.view.project(self.view.normalize(hidden, self.exit))
