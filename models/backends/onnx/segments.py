"""Pieces put together to one graph: `chain` of layers that run one after the other, `bundle` of pieces that
all read the same states.

What pieces share (masks, positions) is one input; what belongs to a layer is named `<name>.<layer>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

SHARED = ("source_mask", "last", "capacity", "row_count", "queries", "kept", "places")
OWNED = ("bias", "cosines", "sines")  # the same for all layers that have the same owner
OwnerOf = Callable[[int], int]  # the layer whose biases and rotation a layer uses


def chain(
    pieces: Iterable[tuple[int, ir.Model]], owner: OwnerOf, aside: Iterable[tuple[int, ir.Model]] = ()
) -> ir.Model:
    """One graph in which each piece's `hidden` is what the one before made: layers (index, piece). What the
    pieces `aside` make of the last one's, one after the other, is a further output, `exit_out`."""
    assembly = Assembly(owner)
    for index, piece in pieces:
        assembly.hidden = assembly.add(index, piece).pop("hidden_out")
    outputs = {"hidden_out": assembly.hidden}
    for index, piece in aside:
        assembly.hidden = outputs["exit_out"] = assembly.add(index, piece).pop("hidden_out")
    return assembly.finish(outputs)


def bundle(pieces: Iterable[tuple[int, ir.Model]], owner: OwnerOf) -> ir.Model:
    """One graph in which all pieces read the same `hidden`."""
    assembly = Assembly(owner)
    for index, piece in pieces:
        assembly.add(index, piece)
    return assembly.finish({})


class Assembly:
    """A graph under construction. Pieces are taken apart for it."""

    def __init__(self, owner: OwnerOf) -> None:
        self.owner = owner
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.hidden: ir.Value | None = None  # what the next piece reads; None: what comes from outside
        self.opsets: dict[str, int] = {}

    def add(self, index: int, piece: ir.Model) -> dict[str, ir.Value]:
        """Take over all of a piece; return its outputs by name."""
        graph = piece.graph
        inputs, outputs = list(graph.inputs), {str(value.name): value for value in graph.outputs}
        nodes, initializers = list(graph), list(graph.initializers.values())
        graph.inputs.clear()
        graph.outputs.clear()
        graph.initializers.clear()
        graph.remove(nodes)
        for value in [*initializers, *(output for node in nodes for output in node.outputs)]:
            value.name = f"{index}/{value.name}" if value.name else value.name
        for node in nodes:
            node.name = f"{index}/{node.name}"
        for value in inputs:
            self._connect(value, index)
        self.nodes += nodes
        self.initializers += initializers
        self.opsets |= piece.opset_imports
        self.outputs |= {
            f"{name}.{index}": output for name, output in outputs.items() if name != "hidden_out"
        }
        return outputs

    def finish(self, outputs: dict[str, ir.Value | None]) -> ir.Model:
        """The graph with `outputs` before those of its layers."""
        named = {name: value for name, value in outputs.items() if value is not None} | self.outputs
        for name, value in named.items():
            value.name = name
        graph = ir.Graph(
            list(self.inputs.values()),
            list(named.values()),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=self.opsets,
            name="segment",
        )
        return ir.Model(graph, ir_version=10)

    def _connect(self, value: ir.Value, index: int) -> None:
        """Let a piece's input be the graph's of that name, or the states of the piece before."""
        name = str(value.name)
        if name == "hidden" and self.hidden is not None:
            value.replace_all_uses_with(self.hidden)
            return
        if name not in ("hidden", *SHARED):
            name = f"{name}.{self.owner(index) if name in OWNED else index}"
        value.name = name
        given = self.inputs.setdefault(name, value)
        if given is not value:
            value.replace_all_uses_with(given)
