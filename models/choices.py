"""Names that flags and checkpoints choose from. Nothing here imports torch."""

from __future__ import annotations

BACKENDS = ("torch", "onnx", "compile")  # what runs the layers: see models.backends
MIXED = "w8+int8"  # int8 for sources and prompts, w8 for what is decoded
PRECISIONS = ("fp32", "w8", "w4", "int8", MIXED)  # of exported weights
EXACT_PRECISIONS = ("fp32", "w8", "int8", MIXED)  # in which a token has the same bits in every window
EXIT_PRECISIONS = tuple(name for name in PRECISIONS if name != MIXED)  # of an exit adapter's own weights
PER_EXIT_HEADS = ("norm", "projection")
KEEPING_EXIT_ADAPTERS = ("layer", "attention")  # with keys/values of their own
EXIT_ADAPTERS = (*KEEPING_EXIT_ADAPTERS, "projection", "norm")
ALL_LAYER_LOSSES = ("ce", "weighted_ce", "sum_l")  # with an exit after every layer
ROTATIONAL = "rotational"
GRADUAL = "gradual"
EXIT_CURRICULA = (ROTATIONAL, GRADUAL)
INTERMEDIATE_LOSSES = (
    *ALL_LAYER_LOSSES,
    "shallowdeep_ce",
    "shallowdeep_kd_last",
    "shallowdeep_kd_unif",
    "shallowdeep_kd_dyna",
)
