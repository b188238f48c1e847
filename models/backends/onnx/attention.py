"""What attention becomes in an exported graph: one operator of ONNX Runtime's, chosen by what is attended to.

Hugging Face's layers call the attention function that their config names. While a layer is traced, it names
`attend`, which writes the operator instead of computing anything. Keys/values live in buffers of a fixed
capacity N that the operator itself appends to.

Source of the operators: github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from models.backends.onnx.rotation import Rotation
from models.backends.shared import Pair
from models.families.rotary import ROTATE, names_beside

NAME = "exitlm_export"  # and the name of the function that threads without `ATTENDED` go on with
EXPORTING = Lock()  # while what all models share is replaced


@dataclass
class Attended:
    """What the attentions of one traced layer read besides its input. B batch, Q new tokens, R query rows, S
    source tokens, H heads, W their width, N capacity.

    Attention multiplies a lone query row by another kernel than several, and its bits differ: where they must
    not, it gets a copy of the row beside it. `queries` says which tokens make the R rows, `kept` which rows
    are the Q tokens'.
    """

    source_mask: Tensor | None = None  # (B, S) int32, 0 at padding
    memory: Pair | None = None  # (B, H, S, W) keys, values of the source
    past: Pair | None = None  # (B, H, N, W) buffers of the layer's own keys, values
    bias: Tensor | None = None  # (B or 1, H or 1, R, N), added to scores
    last: Tensor | None = None  # (B,) int32, position of the last row
    capacity: Tensor | None = None  # () int32
    row_count: Tensor | None = None  # (B,) int32, R
    queries: Tensor | None = None  # (R,)
    kept: Tensor | None = None  # (Q,)
    rotation: Rotation | None = None  # that the operator does, if `rotates`
    rotates: bool = False  # whether the layer left it to the operator
    written: list[Tensor] = field(default_factory=list)  # the buffers with the new keys, values


ATTENDED: ContextVar[Attended] = ContextVar("attended")


@contextmanager
def attending(attended: Attended) -> Iterator[None]:
    """Trace a layer whose attentions read `attended`."""
    token = ATTENDED.set(attended)
    try:
        yield
    finally:
        ATTENDED.reset(token)


def attend(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (B, H, Q, W) queries as one operator: (B, Q, H, W).

    Masks and biases that the layer passes are not read: the operators mask by position, and biases are
    those of `Attended`. A thread that has none decodes meanwhile, with a model of the same configuration:
    by the function named `before`.
    """
    attended = ATTENDED.get(None)
    if attended is None:
        return stock_attention(before, module)(module, query, key, value, *args, scaling=scaling, **options)
    heads, width = query.shape[1], query.shape[3]
    merged = [states.transpose(1, 2).flatten(2) for states in (query, key, value)]  # (B, Q, H * W)
    attributes: dict[str, Any] = {"num_heads": heads, "scale": float(scaling)}
    if options.get("softcap") is not None:  # that scores approach
        attributes["softcap"] = float(options["softcap"])
    if attended.memory is not None and key is attended.memory[0]:
        others = [key, value, None, attended.source_mask]
        output = multi_head(select(merged[0], attended.queries), others, attributes)
    elif attended.past is None:  # an encoder's
        output = multi_head(merged[0], [*merged[1:], None, attended.source_mask, attended.bias], attributes)
    else:
        packed = select(torch.cat(merged, -1), attended.queries)
        output = group_query(packed, heads * width, attended, attributes | {"kv_num_heads": key.shape[1]})
    return select(output, attended.kept).unflatten(-1, (heads, width)), None


def stock_attention(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that configs call by `name`; each family has an eager one of its own."""
    return AttentionInterface().get_interface(name, names_beside(module).get("eager_attention_forward"))


@contextmanager
def rotated_by_operator(layer: nn.Module) -> Iterator[None]:
    """Let a layer pass on queries and keys as they are; layers without positions do anyway, and those that
    another thread runs rotate them as ever."""

    def leave(query: Tensor, key: Tensor, *tables: Any, **options: Any) -> Pair:
        attended = ATTENDED.get(None)
        if attended is None:
            return stock(query, key, *tables, **options)
        attended.rotates = True
        return query, key

    names = names_beside(layer)
    stock = names[ROTATE]
    names[ROTATE] = leave
    try:
        yield
    finally:
        names[ROTATE] = stock


def select(states: Tensor, rows: Tensor | None) -> Tensor:
    return states if rows is None else states.index_select(1, rows)


def multi_head(query: Tensor, others: list[Tensor | None], attributes: dict[str, Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [query, *others],
        attributes,
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def group_query(packed: Tensor, width: int, attended: Attended, attributes: dict[str, Any]) -> Tensor:
    """Self-attention of (B, R, 3 * `width`) queries, keys and values."""
    assert attended.past is not None
    unused, rotation = None, attended.rotation if attended.rotates else None
    if rotation is not None:
        attributes = attributes | {"do_rotary": 1}
    output, *attended.written = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        [
            *(packed, unused, unused, *attended.past, attended.last, attended.capacity),
            *(rotation or (unused, unused, unused)),
            *(attended.bias, unused, unused, unused, unused, unused, attended.row_count),
        ],
        attributes,
        dtypes=[packed.dtype] * 3,
        shapes=[(*packed.shape[:2], width), attended.past[0].shape, attended.past[1].shape],
        version=1,
    )
    return output


class NewOnly:
    """Under Hugging Face's cache interface: keys/values as they come, as the operator appends them itself."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Pair:
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


@contextmanager
def exported_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's layers write operators while inside, without dropout: one model at a time."""
    with EXPORTING:
        before, training = model.config._attn_implementation, model.training
        model.eval().set_attn_implementation(register_attention(before))
        try:
            yield
        finally:
            model.train(training).set_attn_implementation(before)


def register_attention(before: str) -> str:
    """The name that stands for `attend`; masks are those of the function before."""
    name = f"{NAME}_{before}"
    AttentionInterface.register(name, partial(attend, before))
    masks = AttentionMaskInterface()
    if before in masks:
        AttentionMaskInterface.register(name, masks[before])
    return name
