"""GPT-2: learned positions, queries, keys and values of one product."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from models.families.causal import CausalState, CausalView
from models.families.learned_positions import check_positions
from models.families.stack import Block, split_pair


class GPT2View(CausalView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.transformer
        super().__init__(model, decoder, decoder.h, decoder.ln_f)
        self.max_positions = decoder.wpe.num_embeddings
        attention = self.layers[0].attn
        self.key_value_shape = (attention.num_heads, attention.head_dim)

    def place(self, state: CausalState, embedded: Tensor, past: int, total: int) -> Tensor:
        check_positions(state, total, self.max_positions)
        return self.decoder.drop(embedded + self.decoder.wpe(state.positions[:, past:total]))

    def project_kv(self, layer: Block, hidden: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        attention = layer.attn
        _, keys, values = attention.c_attn(layer.ln_1(hidden)).split(attention.split_size, dim=-1)
        return split_pair(keys, values, attention.head_dim)
