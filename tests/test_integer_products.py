"""Products in integers against arithmetic by hand."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from models.backends.onnx import integers, quantization
from models.backends.onnx.fusion import initializer
from models.backends.onnx.integers import quantize_rows

WIDTH = 64


@pytest.fixture(autouse=True, params=["unsigned", "as here"])
def weights_of_either_sign(request, monkeypatch):
    if request.param == "unsigned":
        for module in (integers, quantization):
            monkeypatch.setattr(module, "has_signed_products", lambda: False)
    return request.param


def session_of(**weights):
    """A graph that multiplies the states x (1, rows, WIDTH) with each matrix, in integers."""
    states = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", WIDTH]))
    graph = ir.Graph([states], [], nodes=[], opset_imports={"": 21}, name="products")
    for name, weight in weights.items():
        product = ir.node("MatMul", [states, initializer(graph, f"{name}.weight", weight)])
        product.outputs[0].name, product.outputs[0].type = name, states.type
        graph.append(product)
        graph.outputs.append(product.outputs[0])
    model = ir.Model(graph, ir_version=10)
    quantize_rows(model)
    return model, onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())


def by_hand(states, weight):
    """Row by row and column by column, each scaled so that its largest magnitude is 127."""
    out = np.zeros((len(states), weight.shape[1]))
    for i, row in enumerate(states):
        for j, column in enumerate(weight.T):
            row_scale, column_scale = np.abs(row).max() / 127, np.abs(column).max() / 127
            if row_scale and column_scale:
                integers = np.rint(row / row_scale) @ np.rint(column / column_scale)
                out[i, j] = integers * row_scale * column_scale
    return out


@pytest.fixture(scope="module")
def example():
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((WIDTH, 24), np.float32) for name in ("a", "b")}
    weights["a"][:, 3] = 0
    weights["b"][:, 5] *= 1000
    weights["b"][:, 6] = 2  # with states[6]: sums of two products need more than 16 bits
    states = random.standard_normal((9, WIDTH), np.float32)
    states[2] = 0
    states[4] *= 1e-6
    states[5, 7] = 500
    states[6] = -3
    return states, weights


def test_products_are_those_of_rounded_rows_and_columns(example):
    states, weights = example
    _, session = session_of(**weights)
    for name, made in zip(weights, session.run(list(weights), {"x": states[None]}), strict=True):
        expected = by_hand(states, weights[name])
        magnitude = np.abs(expected).max(1, keepdims=True)
        assert (np.abs(made[0] - expected) <= 1e-5 * magnitude).mean() > 0.99  # but for ties of rounding
        assert (np.abs(made[0] - expected) <= 2e-2 * magnitude).all()


def test_graphs_for_other_processors_have_other_names(weights_of_either_sign):
    signed = integers.has_signed_products()
    model, _ = session_of(a=np.ones((WIDTH, 1), np.float32))
    (weight,) = [value for name, value in model.graph.initializers.items() if name.endswith(".integers")]
    assert weight.dtype == (ir.DataType.INT8 if signed else ir.DataType.UINT8)
    assert quantization.graphs_of("int8") != ("int8" if signed else "int8, signed")
    assert quantization.graphs_of("w8") == "w8"


def test_a_row_has_the_same_bits_in_any_company(example):
    states, weights = example
    _, session = session_of(**weights)
    together = session.run(None, {"x": states[None]})
    for rows in (1, 2, 4, 5):
        for start in range(0, len(states) - rows + 1):
            window = session.run(None, {"x": states[None, start : start + rows]})
            for alone, whole in zip(window, together, strict=True):
                assert (alone[0] == whole[0, start : start + rows]).all()


def test_products_of_the_same_states_round_them_once(example):
    model, _ = session_of(**example[1])
    operators = [node.op_type for node in model.graph]
    assert operators.count("QuantizeLinear") == 1 and operators.count("MatMulIntegerToFloat") == 2
