"""GPT-NeoX, Pythia's family: rotary positions on a part of each head, attention and MLP side by side."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from models.families.causal import CausalState
from models.families.rotary import RotaryView
from models.families.stack import Block, split_heads


class GPTNeoXView(RotaryView):
    cache_argument = "layer_past"

    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.gpt_neox
        super().__init__(model, decoder, decoder.layers, decoder.final_layer_norm)
        self.key_value_shape = (model.config.num_attention_heads, self.layers[0].attention.head_size)

    def place(self, state: CausalState, embedded: Tensor, past: int, total: int) -> Tensor:
        return self.decoder.emb_dropout(embedded)

    def project_kv(self, layer: Block, hidden: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        attention = layer.attention
        fused = attention.query_key_value(layer.input_layernorm(hidden))  # (B, Q, H * 3 * W)
        _, keys, values = split_heads(fused, 3 * attention.head_size).chunk(3, dim=-1)
        return self.rotate(attention, keys, inputs), values
