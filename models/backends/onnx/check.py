"""Whether what was exported computes what the modules do: asked once, when it is exported.

Views come from outside, too, and layers may do what no export expects; a model that decodes nonsense must not
go unnoticed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from models.backends.onnx.view import OnnxView
from models.choices import MIXED
from models.errors import UserError

TOLERANCE = {
    "fp32": 1e-3,
    "w8": 0.3,
    "w4": 1.0,
    "int8": 0.6,
    MIXED: 0.6,
}  # of the norm of all logits: rounding, not faults
SOURCE, TOKENS = 8, 6


@torch.inference_mode()
def check_export(view: OnnxView) -> None:
    """Compare the logits of a few tokens with those of the modules.

    Raises:
        UserError: they are others.
    """
    ours, theirs = logits_of(view), logits_of(view.eager)
    for our_logits, their_logits in zip(ours, theirs, strict=True):
        error = ((our_logits - their_logits).norm() / their_logits.norm()).item()
        if error <= TOLERANCE[view.engine.precision]:
            continue
        family = view.model.config.model_type
        raise UserError(
            f"backend onnx: what was exported of this {family} model differs from its modules "
            f"(by {error:.0%} in {view.engine.precision}); use backend torch, or another precision."
        )


def logits_of(view: Any) -> tuple[Tensor, ...]:
    """Logits of two sequences of fixed tokens, one with a padded source or prompt, at full depth and of the
    exit that has an adapter: (2, TOKENS, V) each."""
    generator = torch.Generator().manual_seed(0)
    words = view.model.get_input_embeddings().weight.shape[0]
    source = torch.randint(words, (2, SOURCE), generator=generator)
    mask = torch.ones(2, SOURCE, dtype=torch.long)
    mask[1, : SOURCE // 2] = 0
    read = view.read(source, mask)
    state = view.begin(None, **read.arguments)
    targets = view.model.get_output_embeddings().weight.shape[0]
    tokens = torch.randint(targets, (2, TOKENS), generator=generator)
    adapter = view.exit_adapter
    cuts = [0, view.num_layers] if adapter is None else [0, adapter.layer, view.num_layers]
    parts = []
    prompt = [] if read.prompt is None else [read.prompt]
    for window in [*prompt, *tokens.split([1, TOKENS - 1], dim=1)]:
        hidden, logits = view.embed(state, window), []
        for start, stop in pairwise(cuts):
            hidden = view.run_layers(state, hidden, start, stop)
            logits.append(view.predict(view.read_exit(state, hidden, stop), stop))
        parts.append(logits)
    return tuple(torch.cat(windows, dim=1) for windows in zip(*parts[len(prompt) :], strict=True))
