"""Llama and those built like it: Mistral, Qwen2, Qwen3, SmolLM3, Gemma, Gemma 2, Gemma 3 (text).

`LlamaView(model)` drives the layers of an unmodified `LlamaForCausalLM` and its relatives; see `DecoderView`.
Norms of queries and keys, layers without positions (SmolLM3), scaled embeddings and capped attention scores
(Gemma) are the layers' own affair.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from models.families.rotary import RotaryView
from models.families.stack import Block, split_heads


class LlamaView(RotaryView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.model
        super().__init__(model, decoder, decoder.layers, decoder.norm)
        self.key_value_shape = (model.config.num_key_value_heads, self.layers[0].self_attn.head_dim)
        self.heads_of_group = model.config.num_attention_heads // model.config.num_key_value_heads
        self.output_cap = getattr(model.config, "final_logit_softcapping", None)

    def project_kv(self, layer: Block, hidden: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        attention, normalized = layer.self_attn, layer.input_layernorm(hidden)
        keys = split_heads(attention.k_proj(normalized), attention.head_dim)
        values = split_heads(attention.v_proj(normalized), attention.head_dim)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        if getattr(attention, "use_rope", True):
            keys = self.rotate(attention, keys, inputs)
        return keys, values


class Gemma3View(LlamaView):
    """Layers with a window have rotary positions of their own."""

    def rotation(self, like: Tensor, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        return self.decoder.rotary_emb(like, positions, kind)
