"""Weights in fewer bits: `quantize(model, precision)` of one piece.

- w8: the weights of a column share a scale, and so do the activations of a row. Products of integers are
  exact, so that a row has the same bits whatever rows are beside it;
- w4: blocks of 32 weights share a scale, and activations are rounded block by block, row by row (ONNX
  Runtime's MatMulNBits at accuracy level 4);
- int8: dynamic quantization. Columns of weights share a scale, and so do the activations of all rows: a node
  a product, but the tokens of a window change each other.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from models.backends.onnx.integers import quantize_rows

BITS, BLOCK = 4, 32
INTEGER_ACTIVATIONS = 4  # accuracy level; others compute in float32, 15 times slower


def quantize(model: ir.Model, precision: str) -> ir.Model:
    """A model whose products with constant matrices have weights of `precision`; biases and norms stay."""
    if precision == "fp32":
        return model
    if precision == "w8":
        quantize_rows(model)
        return model
    proto = ir.to_proto(model)
    with quiet_quantizers():
        return ir.from_proto(quantize_dynamic(proto) if precision == "int8" else quantize_blocks(proto))


def quantize_blocks(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    config = library.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=INTEGER_ACTIVATIONS, bits=BITS
    )
    quantizer = library.MatMulNBitsQuantizer(proto, algo_config=config)
    quantizer.process()
    return quantizer.model.model


def quantize_dynamic(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime import quantization as library

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        library.quantize_dynamic(
            proto,
            path,
            op_types_to_quantize=["MatMul"],
            weight_type=library.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,  # products of 8 bits overflow without, on processors that have no VNNI
        )
        return onnx.load(path)


@contextmanager
def quiet_quantizers() -> Iterator[None]:
    """Keep the quantizers from reporting every node, and from configuring everybody's logging on import."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, list(root.handlers), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        root.handlers[:] = handlers
