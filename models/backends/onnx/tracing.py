"""Tracing a piece once a kind: layers that differ in their weights alone share a graph.

`Kinds.model(piece)` returns the piece as an ONNX model with its own weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from torch import nn

from models.backends.onnx.pieces import Piece

OPSET = 21
UNREAD = "relative_attention_bias"  # biases are inputs of a graph
PER_LAYER = ("layer_idx", "has_relative_attention_bias")  # attributes that change nothing in a graph


class Kinds:
    """The kinds of pieces traced so far, their weights being inputs."""

    def __init__(self) -> None:
        self.models: dict[Any, ir.Model] = {}

    def model(self, piece: Piece) -> ir.Model:
        """The piece with its weights. Trace inside `exported_attention`."""
        signature = describe(piece)
        if signature not in self.models:
            self.models[signature] = trace(piece)
        return with_weights(self.models[signature].clone(), piece)


def with_weights(model: ir.Model, piece: Piece) -> ir.Model:
    """Turn the inputs that are named as weights of the piece into initializers, and fuse what can be."""
    state, inputs = piece.state_dict(), model.graph.inputs
    for value in list(inputs):
        name = value.name or ""
        if name not in state:
            continue
        inputs.remove(value)
        value.const_value = ir.tensor(state[name].detach().numpy(), name=name)
        model.graph.register_initializer(value)
    optimizer.optimize(model)
    model, _ = optimize_for_ort(model)
    return model


def describe(piece: Piece) -> tuple[Any, ...]:
    """What a piece's graph depends on: kinds of modules, their plain attributes, shapes of weights."""
    modules = [
        (name, type(module).__qualname__, *sorted((key, repr(value)) for key, value in plain(module)))
        for name, module in piece.layer.named_modules()
        if not name.endswith(UNREAD)
    ]
    shapes = {name: tuple(weight.shape) for name, weight in piece.layer.named_parameters()}
    weights = [(name, shape) for name, shape in shapes.items() if UNREAD not in name]
    return type(piece), piece.key, tuple(modules), tuple(weights)


def plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if isinstance(value, bool | int | float | str | None) and key not in PER_LAYER:
            yield key, value


def trace(piece: Piece) -> ir.Model:
    """Trace one piece with torch's exporter; its weights become the graph's last inputs."""
    examples = {name: example for name, (example, _) in piece.inputs.items()}
    axes = {name: dict(varying) for name, (_, varying) in piece.inputs.items()}
    with torch.no_grad(), quiet():
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
    return model


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
