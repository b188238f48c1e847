"""Bits of a token in windows and batches on ONNX Runtime, and what lower precisions change."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from decoding_cases import MANY_ENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_models import MAX_EXAMPLES, WINDOWED, check_bits_in_windows, decode, loaded, perturbed
from pairs import covering, slow_but, thin
from tiny_models import FAMILIES, padded_inputs
from transformers.modeling_outputs import BaseModelOutput

from models import (
    FixedThreshold,
    Free,
    FullDepth,
    PromptLookup,
    SoftmaxGap,
    UserError,
    prepare,
)
from models.backends.onnx import engine as engine_module
from models.backends.onnx.check import check_export
from models.backends.onnx.fusion import initializer
from models.backends.onnx.quantization import BLOCKS, block_size, quantize
from models.choices import EXACT_PRECISIONS, MIXED


def states_of(view, inputs, hidden, windows, rows=slice(None)):
    """Hidden states, keys, values and logits of some rows of a batch, their tokens decoded in windows."""
    chosen = {name: tensor[rows] for name, tensor in inputs.items()}
    with torch.inference_mode():
        if view.eager.exports_encoder:
            source = view.encode(**chosen)
        else:  # torch's, whose bits depend on the batch
            source = BaseModelOutput(view.encode(**inputs)[0][rows])
        state = view.begin(None, encoder_outputs=source, attention_mask=chosen["attention_mask"])
        made, start = [], 0
        for new in windows:
            made.append(view.run_layers(state, hidden[rows, start : start + new], 0, view.num_layers))
            start += new
        states = torch.cat(made, 1)
        logits = torch.cat([view.predict(part, view.num_layers) for part in made], 1)
    buffers = [buffer[:, :, :start].clone() for pair in state.buffers.pairs for buffer in pair]
    return [states, logits, *buffers]


@pytest.mark.parametrize(
    ("family", "precision"), slow_but([("t5-tied", "fp32")], covering(FAMILIES, EXACT_PRECISIONS))
)
def test_a_token_has_the_same_bits_alone_in_windows_and_in_batches(family, precision):
    view = prepare(loaded(perturbed(family)), precision=precision).view
    inputs = padded_inputs(3)
    torch.manual_seed(1)
    hidden = torch.randn(3, WINDOWED, view.model.config.hidden_size)
    check_bits_in_windows(lambda windows, rows: states_of(view, inputs, hidden, windows, rows))


@pytest.mark.slow
@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    threshold=st.sampled_from([-1.0, 0.02, 0.1, 0.5]),
    layer=st.integers(1, 5),
    max_pending=st.sampled_from([None, 1, 3, 6]),
    tokens=st.sampled_from([None, 2, 6]),
    precision=st.sampled_from(["w8", "int8"]),
)
def test_lossless_in_8_bits_is_full_depth_in_8_bits(
    seed, batch, threshold, layer, max_pending, tokens, precision
):
    model, inputs = eight_bits(precision), padded_inputs(1 if tokens else batch, seed=seed)
    options = {"lookup": PromptLookup(tokens, shortest=1) if tokens else None, "max_pending": max_pending}
    policy = Free(layer, SoftmaxGap(), FixedThreshold(threshold), lossless=True, **options)
    options = {"max_length": 24, **MANY_ENDS}
    expected = decode(model, inputs, FullDepth(), **options)
    assert torch.equal(decode(model, inputs, policy, **options), expected)


@functools.cache
def eight_bits(precision):
    return prepare(loaded(perturbed("t5-tied")), precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "family"), covering(["w8", "w4", "int8"], ["t5-tied", "bart-tied"]))
def test_quantized_products_are_near_the_exact_ones(family, precision):
    bits = {"w4": 4}.get(precision, 8)
    torch_model = loaded(perturbed(family))
    view, exact = prepare(torch_model, precision=precision).view, prepare(torch_model).view
    hidden = torch.randn(3, 6, view.model.config.hidden_size)
    for ours, theirs in zip(
        states_of(view, padded_inputs(3), hidden, [6]), states_of(exact, padded_inputs(3), hidden, [6]),
        strict=True,
    ):  # fmt: skip
        error = (ours - theirs).norm() / theirs.norm()
        assert 0 < error < 16 * 0.5**bits  # rounding is half a step of 2 / 2**bits, over 6 layers


@pytest.mark.parametrize("precision", [name for name in EXACT_PRECISIONS if name != MIXED])
@pytest.mark.parametrize(("depth", "width"), [(576, 960), (1536, 576), (1000, 128)])
def test_rows_of_wide_products_do_not_depend_on_others(depth, width, precision):
    """As wide as those of real models, which have larger blocks and other kernels than tiny ones."""
    random = np.random.default_rng(0)
    states = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", depth]))
    graph = ir.Graph([states], [], nodes=[], opset_imports={"": 21}, name="product")
    weight = initializer(graph, "weight", random.standard_normal((depth, width), np.float32))
    product = ir.node("MatMul", [states, weight])
    product.outputs[0].name, product.outputs[0].type = "y", states.type
    graph.append(product)
    graph.outputs.append(product.outputs[0])
    model = quantize(ir.Model(graph, ir_version=10), precision)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    rows = random.standard_normal((1, 12, depth), np.float32)
    (together,) = session.run(None, {"x": rows})
    for count in (1, 2, 3, 5, 7):
        for start in range(0, 13 - count, count):
            (window,) = session.run(None, {"x": rows[:, start : start + count]})
            assert (window == together[:, start : start + count]).all(), (count, start)


def test_an_export_whose_windows_change_tokens_is_refused(monkeypatch):
    """As it would be on a processor whose kernels add up a lone row in another order."""
    view = prepare(loaded(perturbed("t5-tied")), precision="w8").view
    check_export(view)
    run = view.run_layers

    def run_otherwise_alone(state, hidden, start, stop):
        made = run(state, hidden, start, stop)
        return made * (1 + 1e-6) if hidden.shape[:2] == (1, 1) else made

    monkeypatch.setattr(view, "run_layers", run_otherwise_alone)
    with pytest.raises(UserError, match="other bits alone than in a window, in w8; use another precision"):
        check_export(view)


def test_the_mixed_precision_reads_sources_in_int8():
    engine = prepare(loaded(perturbed("bart-tied")), precision=MIXED).view.engine
    quantized = {"MatMulNBits", "MatMulIntegerToFloat"}
    used = {
        kind: quantized & {node.op_type for node in engine._piece(kind, 0).graph}
        for kind in ("encoder", "memory", "exact-layer", "keys-values", "head")
    }
    assert used["encoder"] == used["memory"] == {"MatMulIntegerToFloat"}
    assert used["exact-layer"] == used["keys-values"] == used["head"] == {"MatMulNBits"}


@pytest.mark.parametrize(
    ("depths", "size"), [([576, 1536], 64), ([1536, 1000], 64), ([128, 96], 32), ([48], 32)]
)
def test_blocks_are_the_largest_that_pad_matrices_little(depths, size):
    states = ir.Value(name="x")
    graph = ir.Graph([states], [], nodes=[], name="products")
    for depth in depths:
        weight = initializer(graph, f"weight{depth}", np.zeros((depth, 8), np.float32))
        graph.append(ir.node("MatMul", [states, weight]))
    assert block_size(graph, BLOCKS["w8"]) == size


QUANTIZED = [("t5-tied", "w8"), ("bart-tied", "w4"), ("umt5", "int8")]
QUANTIZED = thin(itertools.product(FAMILIES, ["w8", "w4", "int8", MIXED]), QUANTIZED)
QUANTIZED_PRODUCTS = ("MatMulNBits", "MatMulIntegerToFloat")


@pytest.mark.parametrize(("family", "precision"), slow_but([("t5-tied", "w8")], QUANTIZED))
def test_every_product_with_weights_is_quantized(family, precision):
    engine = prepare(loaded(perturbed(family)), precision=precision).view.engine
    absent = {"exit-head", "exit-entry"} | ({"encoder"} if not engine.view.exports_encoder else set())
    kinds = [kind for kind in engine_module.PIECES if kind not in absent]
    for kind in kinds:
        graph = engine._piece(kind, 0).graph
        operators = [node.op_type for node in graph]
        assert not {"MatMul", "FusedMatMul", "Gemm"} & {*operators}
        assert sum(name in QUANTIZED_PRODUCTS for name in operators) == {
            "head": 1,
            "memory": 2,
            "keys-values": 2,
        }.get(kind, 7 if family in ("mt5", "umt5") else 6)
