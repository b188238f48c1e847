"""Whether what was exported computes what the modules do: asked once, when it is exported.

Views come from outside, too, and layers may do what no export expects; a model that decodes nonsense must not
go unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.backends.onnx.view import OnnxView
from models.errors import UserError

TOLERANCE = {
    "fp32": 1e-3,
    "w8": 0.3,
    "w4": 1.0,
    "int8": 0.6,
}  # of the norm of all logits: rounding, not faults
SOURCE, TOKENS = 8, 6


@torch.inference_mode()
def check_export(view: OnnxView) -> None:
    """Compare the logits of a few tokens with those of the modules.

    Raises:
        UserError: they are others.
    """
    ours, theirs = logits_of(view), logits_of(view.eager)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error <= TOLERANCE[view.engine.precision]:
        family = view.model.config.model_type
        raise UserError(
            f"backend onnx: what was exported of this {family} model differs from its modules "
            f"(by {error:.0%} in {view.engine.precision}); use backend torch, or another precision."
        )


def logits_of(view: Any) -> Tensor:
    """Logits of two sequences of fixed tokens, one with a padded source or prompt: (2, TOKENS, V)."""
    generator = torch.Generator().manual_seed(0)
    words = view.model.get_input_embeddings().weight.shape[0]
    source = torch.randint(words, (2, SOURCE), generator=generator)
    mask = torch.ones(2, SOURCE, dtype=torch.long)
    mask[1, : SOURCE // 2] = 0
    read = view.read(source, mask)
    state = view.begin(None, **read.arguments)
    targets = view.model.get_output_embeddings().weight.shape[0]
    tokens = torch.randint(targets, (2, TOKENS), generator=generator)
    parts = []
    prompt = [] if read.prompt is None else [read.prompt]
    for window in [*prompt, *tokens.split([1, TOKENS - 1], dim=1)]:
        hidden = view.run_layers(state, view.embed(state, window), 0, view.num_layers)
        parts.append(view.predict(hidden, view.num_layers))
    return torch.cat(parts[len(prompt) :], dim=1)
