"""Products in integers whose rows do not depend on each other: `quantize_rows(model)`.

The weights of a column share a scale, and so do the activations of a row. Sums of products of integers are
exact, so that a row has the same bits whatever rows are multiplied beside it.

Processors with VNNI instructions sum products of unsigned and signed bytes exactly, twice as fast as those of
unsigned ones; on others ONNX Runtime's kernels for signed weights add pairs of products in 16 bits, which
overflow.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from models.backends.onnx.fusion import constant, initializer, is_constant

LARGEST, ZERO = 127, 128  # an unsigned byte ZERO + n stands for the integer n of -LARGEST..LARGEST
MICROSOFT = "com.microsoft"  # domain of ONNX Runtime's own operators


def has_signed_products() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def quantize_rows(model: ir.Model) -> None:
    """Compute (.., K) x (K, N) products with constant matrices in 8 bits."""
    graph, constants, signed = model.graph, Constants(model.graph), has_signed_products()
    model.opset_imports[MICROSOFT] = 1
    rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # states to their integers and scales
    for product in list(graph):
        if product.op_type != "MatMul" or not is_constant(product.inputs[1]):
            continue
        before = Insertion(graph, product)
        states, weight = product.inputs
        assert states is not None and weight is not None
        # Step 1. A row's scale is its largest magnitude: states / scale lie in -1..1, in steps of 1 / 127.
        # Of a row of zeros, whose scale is zero, the integers do not matter.
        if states not in rounded:
            scale = before.add("ReduceMax", before.add("Abs", states), constants.last_axis)
            fractions = before.add("Div", states, scale)
            integers = before.add("QuantizeLinear", fractions, constants.step, constants.zero_point)
            rounded[states] = integers, scale
        integers, scale = rounded[states]
        # Step 2. The product of integers, times the scales of columns and of rows.
        columns = column_scales(constant(weight))
        matrix = np.rint(constant(weight) / columns)
        matrix = matrix.astype(np.int8) if signed else (matrix + ZERO).astype(np.uint8)
        weights = initializer(graph, f"{weight.name}.integers", matrix)
        scales = initializer(graph, f"{weight.name}.scales", columns)
        zero_points = [constants.zero_point] * (1 if signed else 2)  # of states, and of weights
        operands = integers, weights, constants.step, scales, *zero_points
        before.replace(before.add("Mul", before.add("MatMulIntegerToFloat", *operands), scale))
    RemoveUnusedNodesPass()(model)


def column_scales(matrix: np.ndarray) -> np.ndarray:
    """(K, N) -> (N,), so that each column's largest magnitude becomes 127."""
    largest = np.abs(matrix).max(0).astype(np.float32)
    return np.where(largest > 0, largest / LARGEST, 1)


class Constants:
    """What all products of a graph share."""

    def __init__(self, graph: ir.Graph) -> None:
        self.zero_point = initializer(graph, "zero_point", np.array(ZERO, np.uint8))
        self.step = initializer(graph, "step", np.array(1 / LARGEST, np.float32))
        self.last_axis = initializer(graph, "last_axis", np.array([-1], np.int64))


class Insertion:
    """New nodes in front of one that they replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node

    def add(self, operator: str, *inputs: ir.Value) -> ir.Value:
        """The value of a new node."""
        node = ir.node(operator, inputs, domain=MICROSOFT if operator == "MatMulIntegerToFloat" else "")
        node.outputs[0].name = f"{self.node.outputs[0].name}.{operator}"
        self.graph.insert_before(self.node, node)
        return node.outputs[0]

    def replace(self, value: ir.Value) -> None:
        """Let `value` be what the node was."""
        old = self.node.outputs[0]
        old.name, value.name = f"{old.name}.replaced", old.name
        old.replace_all_uses_with(value, replace_graph_outputs=True)
