"""The parts that a model is exported in, as modules to be traced: layer by layer, over the stock modules.

A piece says what it reads and writes, under which names, and which axes vary; `models.backends.onnx.tracing`
traces one of each kind. B batch, Q new tokens, S source tokens, N capacity of the key/value buffers, D model
width, H heads, W their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backends.onnx.attention import Attended, NewOnly, attending
from models.backends.shared import GivenMemory
from models.families.encoder_decoder import EncoderDecoderView

BATCH, NEW, SOURCE, CAPACITY = 2, 3, 7, 11  # sizes of the traced examples
Axes = dict[int, str]


class Piece(nn.Module):
    """A module that is traced with the examples of its `inputs` and computes what `outputs` names."""

    inputs: dict[str, tuple[Tensor, Axes]]  # example and varying axes of each argument, in order
    outputs: tuple[str, ...]
    key: object = None  # what else the graph depends on

    def __init__(self, view: EncoderDecoderView, layer: nn.Module) -> None:
        super().__init__()
        self.view = view
        self.layer = layer


def hidden_example(width: int, length: int = NEW, axis: str = "new") -> tuple[Tensor, Axes]:
    return torch.zeros(BATCH, length, width), {0: "batch", 1: axis}


def keys_example(heads: int, length: int, width: int, axis: str) -> tuple[Tensor, Axes]:
    """A tensor of its own each time: the exporter takes one object for one input."""
    return torch.zeros(BATCH, heads, length, width), {0: "batch", 2: axis}


def source_mask_example() -> tuple[Tensor, Axes]:
    return torch.ones(BATCH, SOURCE, dtype=torch.int32), {0: "batch", 1: "source"}


class DecoderLayer(Piece):
    """Layer `index` of a decoder, which appends keys/values to its buffers."""

    outputs = ("hidden_out", "written_keys", "written_values")

    def __init__(self, view: EncoderDecoderView, index: int, exact: bool = False) -> None:
        """`exact`: a token has the same bits alone and in a window."""
        super().__init__(view, view.layers[index])
        self.index = index
        self.key = exact
        heads, width = view.key_value_shape
        self.inputs = {
            "hidden": hidden_example(view.width),
            "bias": (
                torch.zeros(BATCH, heads, NEW + exact, CAPACITY),
                {0: "biases", 2: "rows", 3: "capacity"},
            ),
            "last": (torch.zeros(BATCH, dtype=torch.int32), {0: "batch"}),
            "capacity": (torch.tensor(CAPACITY, dtype=torch.int32), {}),
            "row_count": (torch.zeros(BATCH, dtype=torch.int32), {0: "batch"}),
            "past_keys": keys_example(heads, CAPACITY, width, "capacity"),
            "past_values": keys_example(heads, CAPACITY, width, "capacity"),
            "source_mask": source_mask_example(),
            "memory_keys": keys_example(heads, SOURCE, width, "source"),
            "memory_values": keys_example(heads, SOURCE, width, "source"),
        }
        if exact:
            self.inputs["queries"] = (torch.tensor([0, 1, 2, 2]), {0: "rows"})
            self.inputs["kept"] = (torch.arange(NEW), {0: "new"})

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor,
        last: Tensor,
        capacity: Tensor,
        row_count: Tensor,
        past_keys: Tensor,
        past_values: Tensor,
        source_mask: Tensor,
        memory_keys: Tensor,
        memory_values: Tensor,
        queries: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        memory, past = (memory_keys, memory_values), (past_keys, past_values)
        attended = Attended(source_mask, memory, past, bias, last, capacity, row_count, queries, kept)
        inputs, cache = self.view.traced_inputs(hidden), GivenMemory(NewOnly(), {self.index: memory})
        with attending(attended):
            hidden = self.view.apply_layers(hidden, inputs, cache, self.index, self.index + 1)
        keys, values = attended.written
        return hidden, keys, values


class EncoderLayer(Piece):
    """Layer `index` of an encoder."""

    outputs = ("hidden_out",)

    def __init__(self, view: EncoderDecoderView, index: int) -> None:
        super().__init__(view, view.encoder_layers[index])
        heads = view.encoder_heads
        self.inputs = {
            "hidden": hidden_example(view.width, SOURCE, "source"),
            "source_mask": source_mask_example(),
        }
        if view.source_bias(index, SOURCE) is not None:
            self.inputs["bias"] = (torch.zeros(1, heads, SOURCE, SOURCE), {2: "source", 3: "source"})

    def forward(self, hidden: Tensor, source_mask: Tensor, bias: Tensor | None = None) -> Tensor:
        with attending(Attended(source_mask, bias=bias)):
            return self.view.apply_encoder_layer(self.layer, hidden)


class Memory(Piece):
    """Keys and values that the cross-attention of one decoder layer makes of the source."""

    outputs = ("memory_keys", "memory_values")

    def __init__(self, view: EncoderDecoderView, index: int) -> None:
        super().__init__(view, view.layers[index])
        self.inputs = {"hidden": hidden_example(view.width, SOURCE, "source")}

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.view.project_memory(self.layer, hidden)


class KeysValues(Piece):
    """Keys and values that the self-attention of one decoder layer makes of its input, without running it."""

    outputs = ("keys", "values")

    def __init__(self, view: EncoderDecoderView, index: int) -> None:
        super().__init__(view, view.layers[index])
        self.inputs = {"hidden": hidden_example(view.width)}

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.view.project_kv(self.layer, hidden)


class Head(Piece):
    """Logits of states that are not normalized yet."""

    outputs = ("logits",)

    def __init__(self, view: EncoderDecoderView) -> None:
        super().__init__(view, view.model)
        self.inputs = {"hidden": hidden_example(view.width)}

    def forward(self, hidden: Tensor) -> Tensor:
        return self.view.project(self.view.final_norm(hidden))
