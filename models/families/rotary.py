"""What families with rotary positions share: their tables, and how keys are rotated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.errors import UserError
from models.families.causal import CausalState, CausalView
from models.families.stack import Block

FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # others change with the length of the sequence


class RotaryView(CausalView):
    def __init__(
        self, model: PreTrainedModel, decoder: Any, layers: Iterable[Block], final_norm: nn.Module
    ) -> None:
        super().__init__(model, decoder, layers, final_norm)
        refuse_changing_rope(decoder.rotary_emb.rope_type)

    def make_tables(self, state: CausalState, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions: (B or 1, N, W) both."""
        return self.decoder.rotary_emb(state.like, state.positions)

    def layer_inputs(self, table: Any, mask: Tensor | None, past: int, total: int) -> dict[str, Any]:
        cos, sin = table
        rows = cos[:, past:total], sin[:, past:total]
        return {"attention_mask": mask, "position_embeddings": rows}

    def rotate(self, attention: nn.Module, keys: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Keys (B, H, Q, W) at the positions of the step, by the function of the attention's own module."""
        function: Callable[..., tuple[Tensor, Tensor]] = vars(sys.modules[type(attention).__module__])[
            "apply_rotary_pos_emb"
        ]
        return function(keys, keys, *inputs["position_embeddings"])[1]


def refuse_changing_rope(types: str | dict[str, str]) -> None:
    """Raise UserError for rotary positions by which a token's keys depend on how many tokens there are."""
    for name in types.values() if isinstance(types, dict) else (types,):
        if name not in FIXED_ROPE:
            raise UserError(
                f"Rotary positions of type {name} change with the length of the sequence, so that windows "
                f"would change tokens; supported are {', '.join(FIXED_ROPE)}."
            )
