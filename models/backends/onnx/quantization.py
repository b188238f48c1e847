"""Weights in fewer bits: `quantize(model, precision)` of one piece.

- w8, w4: blocks of 32 weights share a scale, and activations are rounded block by block, row by row (ONNX
  Runtime's MatMulNBits at accuracy level 4);
- int8: the weights of a column share a scale, and so do the activations of a row, see
  `models.backends.onnx.integers`: less precise than w8, and for several rows up to twice as fast.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from models.backends.onnx.integers import quantize_rows

BITS = {"w8": 8, "w4": 4}
BLOCK = 32
INTEGER_ACTIVATIONS = 4  # accuracy level; others compute in float32, 15 times slower


def quantize(model: ir.Model, precision: str) -> ir.Model:
    """A model whose products with constant matrices have weights of `precision`; biases and norms stay."""
    if precision in BITS:
        with quiet_quantizers():
            return ir.from_proto(quantize_blocks(ir.to_proto(model), BITS[precision]))
    if precision == "int8":
        quantize_rows(model)
    return model


def quantize_blocks(proto: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    config = library.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=True, accuracy_level=INTEGER_ACTIVATIONS, bits=bits
    )
    quantizer = library.MatMulNBitsQuantizer(proto, algo_config=config)
    quantizer.process()
    return quantizer.model.model


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
