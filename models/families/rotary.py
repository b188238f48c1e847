"""What families with rotary positions share: their tables, and how keys are rotated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.errors import UserError
from models.families.causal import CausalState, CausalView
from models.families.stack import Block

ROTATE = "apply_rotary_pos_emb"  # what all families call their function
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # others change with the length of the sequence


class RotaryView(CausalView):
    def __init__(
        self, model: PreTrainedModel, decoder: Any, layers: Iterable[Block], final_norm: nn.Module
    ) -> None:
        super().__init__(model, decoder, layers, final_norm)
        refuse_changing_rope(decoder.rotary_emb.rope_type)

    @property
    def rotary_width(self) -> int:
        like = self.model.get_input_embeddings().weight
        return self.rotation(like, torch.zeros(1, 1, dtype=torch.long), self.kinds[0])[0].shape[-1]

    def rotation(self, like: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (B or 1, N), typed as `like`: (B or 1, N, W) both."""
        return self.decoder.rotary_emb(like, positions)

    def make_tables(self, state: CausalState, kind: str) -> tuple[Tensor, Tensor]:
        return self.rotation(state.like, state.positions, kind)

    def layer_inputs(self, table: Any, mask: Tensor | None, past: int, total: int) -> dict[str, Any]:
        cos, sin = table
        rows = cos[:, past:total], sin[:, past:total]
        return {"attention_mask": mask, "position_embeddings": rows}

    def traced_inputs(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        return {kind: {"attention_mask": None, "position_embeddings": rotation} for kind in self.windows}

    def rotate(self, attention: nn.Module, keys: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Keys (B, H, Q, W) at the positions of the step, by the function of the attention's own module."""
        function: Callable[..., tuple[Tensor, Tensor]] = names_beside(attention)[ROTATE]
        return function(keys, keys, *inputs["position_embeddings"])[1]


def names_beside(part: nn.Module) -> dict[str, Any]:
    """The names of the file that a part of a model is written in, to read and to replace."""
    return vars(sys.modules[type(part).__module__])


def refuse_changing_rope(types: str | dict[str, str]) -> None:
    """Raise UserError for rotary positions by which a token's keys depend on how many tokens there are."""
    for name in types.values() if isinstance(types, dict) else (types,):
        if name not in FIXED_ROPE:
            raise UserError(
                f"Rotary positions of type {name} change with the length of the sequence, so that windows "
                f"would change tokens; supported are {', '.join(FIXED_ROPE)}."
            )
