"""The parts that a model is exported in, as modules to be traced: layer by layer, over the stock modules.

A piece says what it reads and writes, under which names, and which axes vary; `models.backends.onnx.tracing`
traces one of each kind. B batch, Q new tokens, S source tokens, N capacity of the key/value buffers, D model
width, H heads, W their width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from models.backends.onnx.attention import Attended, NewOnly, attending, rotated_by_operator
from models.backends.onnx.rotation import as_rotation, operator_rotates, rotation_examples
from models.backends.shared import GivenMemory, Pair
from models.exit_adapter import ExitAdapter
from models.families.encoder_decoder import EncoderDecoderView
from models.families.stack import StackView

BATCH, NEW, SOURCE, CAPACITY = 2, 3, 7, 11  # sizes of the traced examples
Axes = dict[int, str]


class Piece(nn.Module):
    """A module that is traced with the examples of its `inputs` and computes what `outputs` names."""

    inputs: dict[str, tuple[Tensor, Axes]]  # example and varying axes of each argument, in order
    outputs: tuple[str, ...]
    key: object = None  # what else the graph depends on

    def __init__(self, view: StackView, layer: nn.Module) -> None:
        super().__init__()
        self.view: Any = view  # whose kind the piece knows
        self.layer = layer

    @property
    def parts(self) -> list[nn.Module]:
        """What the graph is made of."""
        return [self.layer]


def hidden_example(width: int, length: int = NEW, axis: str = "new") -> tuple[Tensor, Axes]:
    return torch.zeros(BATCH, length, width), {0: "batch", 1: axis}


def keys_example(heads: int, length: int, width: int, axis: str) -> tuple[Tensor, Axes]:
    """A tensor of its own each time: the exporter takes one object for one input."""
    return torch.zeros(BATCH, heads, length, width), {0: "batch", 2: axis}


def source_mask_example() -> tuple[Tensor, Axes]:
    return torch.ones(BATCH, SOURCE, dtype=torch.int32), {0: "batch", 1: "source"}


def pair(first: Tensor | None, second: Tensor | None) -> Pair | None:
    return None if first is None or second is None else (first, second)


class DecoderLayer(Piece):
    """Layer `index` of a decoder, which appends keys/values to its buffers."""

    outputs = ("hidden_out", "written_keys", "written_values")

    def __init__(self, view: StackView, index: int, exact: bool = False) -> None:
        """`exact`: a token has the same bits alone and in a window."""
        super().__init__(view, view.layers[index])
        self.index = index
        self.key = exact
        heads, width = view.key_value_shape
        bias = torch.zeros(BATCH, view.bias_heads, NEW + exact, CAPACITY)
        self.inputs = {
            "hidden": hidden_example(view.width),
            "bias": (bias, {0: "biases", 2: "rows", 3: "capacity"}),
            "last": (torch.zeros(BATCH, dtype=torch.int32), {0: "batch"}),
            "capacity": (torch.tensor(CAPACITY, dtype=torch.int32), {}),
            "row_count": (torch.zeros(BATCH, dtype=torch.int32), {0: "batch"}),
            "past_keys": keys_example(heads, CAPACITY, width, "capacity"),
            "past_values": keys_example(heads, CAPACITY, width, "capacity"),
            **rotation_examples(view, BATCH, NEW + exact, "rows"),
        }
        if exact:
            self.inputs["queries"] = (torch.tensor([0, 1, 2, 2]), {0: "rows"})
            self.inputs["kept"] = (torch.arange(NEW), {0: "new"})
        if isinstance(view, EncoderDecoderView):
            self.inputs |= {
                "source_mask": source_mask_example(),
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
        cosines: Tensor | None = None,
        sines: Tensor | None = None,
        places: Tensor | None = None,
        queries: Tensor | None = None,
        kept: Tensor | None = None,
        source_mask: Tensor | None = None,
        memory_keys: Tensor | None = None,
        memory_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        memory, past = pair(memory_keys, memory_values), (past_keys, past_values)
        rotation, by_operator = as_rotation(cosines, sines, places), operator_rotates(self.view)
        attended = Attended(source_mask, memory, past, bias, last, capacity, row_count, queries, kept)
        attended.rotation = rotation
        inputs = self.view.traced_inputs(hidden, None if rotation is None else rotation.rows(kept))
        cache = NewOnly() if memory is None else GivenMemory(NewOnly(), {self.index: memory})
        with attending(attended), rotated_by_operator(self.layer) if by_operator else nullcontext():
            hidden = self.view.apply_layers(hidden, inputs, cast(Cache, cache), self.index, self.index + 1)
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

    def __init__(self, view: StackView, index: int) -> None:
        super().__init__(view, view.layers[index])
        self.index = index
        self.inputs = {"hidden": hidden_example(view.width), **rotation_examples(view, BATCH, NEW, "new")}

    def forward(
        self,
        hidden: Tensor,
        cosines: Tensor | None = None,
        sines: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rotation = as_rotation(cosines, sines, places)
        rows = None if rotation is None else rotation.rows(None)
        return self.view.traced_keys_values(self.index, hidden, rows)


class ExitEntry(Piece):
    """What an exit adapter's layer reads, of states after the exit's own."""

    outputs = ("hidden_out",)

    def __init__(self, view: StackView) -> None:
        assert view.exit_adapter is not None
        super().__init__(view, view.exit_adapter)
        self.inputs = {"hidden": hidden_example(view.width)}

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(ExitAdapter, self.layer).enter(hidden)


class ExitHead(Piece):
    """Logits of an exit with an adapter, (..., K + 1): of the tokens on its shortlist, and the one that all
    others share; or (..., V) of all tokens."""

    outputs = ("logits",)

    def __init__(self, view: StackView) -> None:
        adapter = view.exit_adapter
        assert adapter is not None
        super().__init__(view, adapter)
        weight, bias = view.projection_weights(adapter.shortlist)
        self.key = listed = adapter.shortlist is not None
        if listed:
            listed_bias = weight.new_zeros(len(weight)) if bias is None else bias
            weight = torch.cat([weight, adapter.others.weight.detach()])
            bias = torch.cat([listed_bias, adapter.others.bias])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.inputs = {"hidden": hidden_example(view.width)}

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(cast(ExitAdapter, self.layer).normalize(hidden), self.weight, self.bias)
        if not self.key:
            return self.view.cap(logits)
        return torch.cat([self.view.cap(logits[..., :-1]), logits[..., -1:]], dim=-1)


class Head(Piece):
    """Logits of states that are not normalized yet."""

    outputs = ("logits",)

    def __init__(self, view: StackView) -> None:
        super().__init__(view, view.model)
        self.inputs = {"hidden": hidden_example(view.width)}

    @property
    def parts(self) -> list[nn.Module]:
        return [self.view.final_norm, self.view.model.get_output_embeddings()]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.view.project(self.view.final_norm(hidden))
