"""BART family (BART, mBART, Pegasus, Marian): absolute positions, biases in every projection.

`BartView(model)` drives the layers of an unmodified `BartForConditionalGeneration` and its relatives; see
`DecoderView`. BART and Marian normalize after each sub-layer and have no final norm; mBART and Pegasus
normalize before and have one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.decoder_view import DecoderState
from models.errors import UserError
from models.families.encoder_decoder import EncoderDecoderView
from models.families.stack import Block, split_pair


class BartView(EncoderDecoderView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        final_norm = getattr(decoder, "layer_norm", None)
        super().__init__(model, decoder.layers, final_norm or nn.Identity())
        self.normalizes_before = final_norm is not None
        self.max_positions = count_positions(decoder)
        attention = self.layers[0].self_attn
        self.key_value_shape = (attention.num_heads, attention.head_dim)
        self.encoder_layers = list(model.get_encoder().layers)
        self.encoder_heads = self.encoder_layers[0].self_attn.num_heads

    @property
    def output_bias(self) -> Tensor:
        return self.model.final_logits_bias

    def embed(self, state: DecoderState, token_ids: Tensor) -> Tensor:
        return embed_tokens(self.decoder, token_ids, state.lengths[0])

    def embed_source(self, token_ids: Tensor) -> Tensor:
        return embed_tokens(self.model.get_encoder(), token_ids, 0)

    def finish_source(self, hidden: Tensor) -> Tensor:
        return getattr(self.model.get_encoder(), "layer_norm", nn.Identity())(hidden)

    def project_kv(self, layer: Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalizes_before:
            hidden = layer.self_attn_layer_norm(hidden)
        attention = layer.self_attn
        return split_pair(attention.k_proj(hidden), attention.v_proj(hidden), attention.head_dim)

    def project_memory(self, layer: Block, encoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.encoder_attn
        keys, values = attention.k_proj(encoder_hidden), attention.v_proj(encoder_hidden)
        return split_pair(keys, values, attention.head_dim)

    def project(self, normalized: Tensor) -> Tensor:
        return self.model.lm_head(normalized) + self.model.final_logits_bias


def count_positions(stack: Any) -> int:
    """Those of an encoder or decoder, without the first of the table that some leave out."""
    return len(stack.embed_positions.weight) - getattr(stack.embed_positions, "offset", 0)


def embed_tokens(stack: Any, token_ids: Tensor, start: int) -> Tensor:
    """What the first layer of an encoder or decoder reads, the first token standing at position `start`."""
    total, known = start + token_ids.shape[1], count_positions(stack)
    if total > known:
        raise UserError(f"The model has {known} positions: cut sources and outputs to that many tokens.")
    positions = stack.embed_positions.weight[-known:]
    # BART and mBART scale inside `embed_tokens`; Pegasus and Marian scale here.
    embedded = stack.embed_tokens(token_ids) * getattr(stack, "embed_scale", 1.0)
    return getattr(stack, "layernorm_embedding", nn.Identity())(embedded + positions[start:total])
