"""OPT: learned positions; norms before each sub-layer or, in OPT-350m, after it, and narrower embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.families.causal import CausalState, CausalView
from models.families.learned_positions import check_positions
from models.families.stack import Block, split_pair


class OPTView(CausalView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.model.decoder
        # The LM head reads what is as wide as embeddings: narrowing is a part of the final norm.
        ends = [part for part in (decoder.final_layer_norm, decoder.project_out) if part is not None]
        super().__init__(model, decoder, decoder.layers, nn.Sequential(*ends))
        self.max_positions = decoder.embed_positions.num_embeddings - decoder.embed_positions.offset
        attention = self.layers[0].self_attn
        self.key_value_shape = (attention.num_heads, attention.head_dim)

    def place(self, state: CausalState, embedded: Tensor, past: int, total: int) -> Tensor:
        positions = self.decoder.embed_positions
        check_positions(state, total, self.max_positions)
        if self.decoder.project_in is not None:
            embedded = self.decoder.project_in(embedded)
        numbered = state.positions[:, past:total]
        return embedded + positions(numbered, position_ids=numbered)

    def project_kv(self, layer: Block, hidden: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if layer.do_layer_norm_before:
            hidden = layer.self_attn_layer_norm(hidden)
        attention = layer.self_attn
        return split_pair(attention.k_proj(hidden), attention.v_proj(hidden), attention.head_dim)
