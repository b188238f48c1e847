"""What ONNX Runtime runs faster and neither exporter nor optimizer fuses: a few passes over one graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def drop_reshapes(graph: ir.Graph) -> None:
    """Read what was reshaped to heads and back from where it came."""
    for node in graph:
        source, shape = node.inputs[0] if node.inputs else None, node.outputs[0].shape
        if node.op_type != "Reshape" or shape is None:
            continue
        while (
            source is not None and (before := source.producer()) is not None and before.op_type == "Reshape"
        ):
            source = before.inputs[0]
            if source is not None and source.shape is not None and same_shape(source.shape, shape):
                node.outputs[0].replace_all_uses_with(source)
                break


def same_shape(first: ir.Shape, second: ir.Shape) -> bool:
    """Whether shapes with the same number of elements are equal: if all axes but one are, the last is too."""
    equal = sum(a == b for a, b in zip(first, second, strict=False))
    return len(first) == len(second) <= equal + 1


def remove_unused(model: ir.Model) -> ir.Model:
    RemoveUnusedNodesPass()(model)
    return model


def fold_transposes(graph: ir.Graph) -> None:
    """Transpose constant matrices for good: layers keep them the other way round than products read them."""
    for node in list(graph):
        if node.op_type == "Transpose" and is_constant(node.inputs[0]):
            node.outputs[0].replace_all_uses_with(transposed(graph, node.inputs[0]))


def unite_products(graph: ir.Graph) -> None:
    """Write every product with a constant matrix as MatMul, and Add where a vector is added to it."""
    for node in list(graph):
        if node.op_type not in ("FusedMatMul", "Gemm") or not is_constant(node.inputs[1]):
            continue
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        factor, transposes = settings.pop("alpha", 1.0), settings.pop("transB", 0)
        if settings.pop("beta", 1.0) != 1 or any(settings.values()):
            continue
        weight = transposed(graph, node.inputs[1]) if transposes else node.inputs[1]
        if factor != 1:
            scaled = constant(weight) * np.float32(factor)
            weight = initializer(graph, f"{node.outputs[0].name}.weight", scaled)
        steps = [("MatMul", weight), *(("Add", value) for value in node.inputs[2:])]
        replace(graph, node, steps)


def replace(graph: ir.Graph, node: ir.Node, steps: list[tuple[str, ir.Value | None]]) -> None:
    """Put operators in a row in place of a node: each on what the one before made, and a value of its own."""
    result, states = node.outputs[0], node.inputs[0]
    name = result.name
    result.name = f"{name}.replaced"
    for operator, other in steps:
        new = ir.node(operator, [states, other])
        states = new.outputs[0]
        states.name = f"{name}.{operator}"
        graph.insert_before(node, new)
    assert states is not None
    states.name = name
    result.replace_all_uses_with(states, replace_graph_outputs=True)


def transposed(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    assert value is not None
    name = f"{value.name}.transposed"
    return graph.initializers.get(name) or initializer(graph, name, constant(value).T)


def pack_products(graph: ir.Graph) -> None:
    """Compute products of the same states that lie side by side (queries, keys, values) as one product."""
    for node in list(graph):
        if node.op_type == "Concat":
            pack(graph, node)


def pack(graph: ir.Graph, concat: ir.Node) -> None:
    products = [product for value in concat.inputs if (product := product_of(value)) is not None]
    if len(products) < len(concat.inputs) or len({node.inputs[0] for node, _ in products}) > 1:
        return
    hidden, name = products[0][0].inputs[0], concat.outputs[0].name
    weights = [constant(node.inputs[1]) for node, _ in products]
    packed = ir.node("MatMul", [hidden, initializer(graph, f"{name}.weight", np.concatenate(weights, 1))])
    nodes = [packed]
    if any(bias is not None for _, bias in products):
        biases = [
            np.zeros(weight.shape[1], weight.dtype) if bias is None else constant(bias)
            for weight, (_, bias) in zip(weights, products, strict=True)
        ]
        bias = initializer(graph, f"{name}.bias", np.concatenate(biases))
        nodes.append(ir.node("Add", [packed.outputs[0], bias]))
    for node in nodes:
        node.outputs[0].name = f"{name}.{node.op_type}"
        graph.insert_before(concat, node)
    concat.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])


def product_of(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None] | None:
    """The product with a constant matrix that `value` is, and the vector that is added to it, if one is."""
    node, bias = None if value is None else value.producer(), None
    if node is not None and node.op_type == "Add":
        first, second = node.inputs
        value, bias = (first, second) if is_constant(second) else (second, first)
        node = None if value is None else value.producer()
        if not is_constant(bias):
            return None
    if node is None or node.op_type != "MatMul" or not is_constant(node.inputs[1]):
        return None
    return node, bias


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def constant(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(np.ascontiguousarray(array), name=name),
    )
    graph.register_initializer(value)
    return value
