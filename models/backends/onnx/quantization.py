"""Weights in fewer bits: `quantize(model, precision)` of one piece.

- w8, w4: weights share a scale in blocks of 64 and 32, and activations are rounded block by block, row by
  row (ONNX Runtime's MatMulNBits at accuracy level 4);
- int8: the weights of a column share a scale, and so do the activations of a row, see
  `models.backends.onnx.integers`: less precise than w8, and for several rows up to twice as fast;
- w8+int8: w8, but int8 where many tokens are read at once: the encoder, what decoder layers make of its
  output, and prompts of models without an encoder, whose layers are thus held twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from models.backends.onnx.fusion import constant, is_constant
from models.backends.onnx.integers import has_signed_products, quantize_rows
from models.choices import MIXED

BITS = {"w8": 8, "w4": 4}
# The larger, the faster. In 8 bits and blocks over 64, ONNX Runtime adds up a lone row in another order than
# one among others; 4 bits lose too much in blocks over 32.
BLOCKS = {"w8": (64, 32), "w4": (32,)}
READING_KINDS = ("encoder", "memory", "prompt-layer")
MOST_PADDING = 1 / 8  # of a matrix, to whole blocks
INTEGER_ACTIVATIONS = 4  # accuracy level; others compute in float32, 15 times slower


def graphs_of(precision: str) -> str:
    """A name for what `quantize` makes, which depends on the processor."""
    return f"{precision}, signed" if precision in ("int8", MIXED) and has_signed_products() else precision


def precision_of(kind: str, precision: str) -> str:
    """That of pieces of a kind, where the whole has `precision`."""
    if precision != MIXED:
        return precision
    return "int8" if kind in READING_KINDS else "w8"


def quantize(model: ir.Model, precision: str) -> ir.Model:
    """A model whose products with constant matrices have weights of `precision`, which is not mixed; biases
    and norms stay."""
    if precision in BITS:
        with quiet_quantizers():
            block = block_size(model.graph, BLOCKS[precision])
            return ir.from_proto(quantize_blocks(ir.to_proto(model), BITS[precision], block))
    if precision == "int8":
        quantize_rows(model)
    return model


def block_size(graph: ir.Graph, sizes: Sequence[int]) -> int:
    """The first of `sizes` that pads no (K, N) matrix much; the last one if all do."""
    weights = [node.inputs[1] for node in graph if node.op_type == "MatMul"]
    depths = [len(constant(weight)) for weight in weights if is_constant(weight)]
    fitting = (size for size in sizes if all(-depth % size <= MOST_PADDING * depth for depth in depths))
    return next(fitting, sizes[-1])


def quantize_blocks(proto: onnx.ModelProto, bits: int, block: int) -> onnx.ModelProto:
    from onnxruntime.quantization import matmul_nbits_quantizer as library

    config = library.DefaultWeightOnlyQuantConfig(
        block_size=block, is_symmetric=True, accuracy_level=INTEGER_ACTIVATIONS, bits=bits
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
