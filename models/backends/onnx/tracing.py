"""Tracing a piece once a kind: layers that differ in their weights alone share a graph.

`Kinds.model(piece)` returns the piece as an ONNX model with its own weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from models.backends.onnx.attention import exported_attention
from models.backends.onnx.fusion import (
    drop_reshapes,
    fold_transposes,
    pack_products,
    remove_unused,
    unite_products,
)
from models.backends.onnx.pieces import Piece
from models.backends.onnx.store import Store

OPSET = 21
UNREAD = "relative_attention_bias"  # biases are inputs of a graph
UNRELATED = (  # settings of a model that say nothing of what one of its pieces computes
    "vocab_size",
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer"),
    *("_name_or_path", "architectures", "transformers_version"),
)
PER_LAYER = ("layer_idx", "has_relative_attention_bias")  # attributes that change nothing in a graph
SCALAR = 1


class Kinds:
    """The kinds of pieces traced so far, their weights being inputs; on disk, too, for other weights."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.models: dict[str, ir.Model] = {}

    def model(self, piece: Piece) -> ir.Model:
        """The piece with its weights."""
        name = hashlib.sha256(repr(describe(piece)).encode()).hexdigest()[:32]
        if name not in self.models:
            self.models[name] = self.store.piece(name, lambda: trace(piece))
        return with_weights(self.models[name].clone(), piece)


def with_weights(model: ir.Model, piece: Piece) -> ir.Model:
    """Turn the inputs that are named as weights of the piece into initializers."""
    state, inputs = piece.state_dict(), model.graph.inputs
    for value in list(inputs):
        name = value.name or ""
        if name not in state:
            continue
        inputs.remove(value)
        value.const_value = ir.tensor(state[name].detach().numpy(), name=name)
        model.graph.register_initializer(value)
    fold_transposes(model.graph)
    unite_products(model.graph)
    pack_products(model.graph)
    return remove_unused(model)


def describe(piece: Piece) -> tuple[Any, ...]:
    """What a piece's graph depends on: configuration, kinds of modules, their plain attributes, shapes of
    weights."""
    modules = [
        (name, type(module).__qualname__, *sorted((key, repr(value)) for key, value in plain(module)))
        for part in piece.parts
        for name, module in part.named_modules()
        if not name.endswith(UNREAD)
    ]
    shapes = [
        (name, tuple(weight.shape))
        for part in piece.parts
        for name, weight in part.named_parameters()
        if UNREAD not in name
    ]
    return related_settings(piece), type(piece).__name__, piece.key, tuple(modules), tuple(shapes)


def related_settings(piece: Piece) -> str:
    settings = json.loads(piece.view.model.config.to_json_string())
    related = (name for name in settings if name not in UNRELATED and not name.endswith("_token_id"))
    return json.dumps({name: settings[name] for name in sorted(related)})


def plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if isinstance(value, bool | int | float | str | None) and key not in PER_LAYER:
            yield key, value


def trace(piece: Piece) -> ir.Model:
    """Trace one piece with torch's exporter; its weights become the graph's last inputs."""
    from onnxscript import optimizer
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    examples = {name: example for name, (example, _) in piece.inputs.items()}
    axes = {name: dict(varying) for name, (_, varying) in piece.inputs.items()}
    with torch.no_grad(), quiet(), exported_attention(piece.view.model):
        program = torch.onnx.export(
            piece,
            kwargs=examples,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=list(examples),
            output_names=list(piece.outputs),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model, weights = program.model, piece.state_dict()
    for name in [name for name in model.graph.initializers if name in weights]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    optimizer.optimize(model)
    model, _ = optimize_for_ort(model)
    drop_reshapes(model.graph)
    check_constants(model.graph)
    return remove_unused(model)


def check_constants(graph: ir.Graph) -> None:
    """A kind serves other weights too: it must have none inside."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > SCALAR:
            raise AssertionError(f"{name} {tensor.shape} is no weight of the piece and no scalar.")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own affairs (torchvision is missing) from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
