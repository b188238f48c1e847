"""BART family (BART, mBART, Pegasus, Marian): absolute positions, biases in every projection.

`BartView(model)` drives the layers of an unmodified `BartForConditionalGeneration` and its relatives; see
`DecoderView`. BART and Marian normalize after each sub-layer and have no final norm; mBART and Pegasus
normalize before and have one.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.errors import UserError
from models.families.encoder_decoder import Block, EncoderDecoderState, EncoderDecoderView, split_heads


class BartView(EncoderDecoderView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        final_norm = getattr(decoder, "layer_norm", None)
        super().__init__(model, decoder.layers, final_norm or nn.Identity())
        self.normalizes_before = final_norm is not None
        # BART and mBART scale inside `embed_tokens`; Pegasus and Marian in the decoder.
        self.embed_scale = getattr(decoder, "embed_scale", 1.0)
        self.embedding_norm = getattr(decoder, "layernorm_embedding", nn.Identity())
        attention = self.layers[0].self_attn
        self.key_value_shape = (attention.num_heads, attention.head_dim)
        self.encoder_layers = list(model.get_encoder().layers)
        self.encoder_heads = self.encoder_layers[0].self_attn.num_heads
        self.output_bias = model.final_logits_bias
        self.position_offset = getattr(decoder.embed_positions, "offset", 0)

    def embed(self, state: EncoderDecoderState, token_ids: Tensor) -> Tensor:
        start = state.lengths[0] + self.position_offset
        positions = self.decoder.embed_positions.weight[start : start + token_ids.shape[1]]
        if len(positions) < token_ids.shape[1]:
            limit = len(self.decoder.embed_positions.weight) - self.position_offset
            raise UserError(f"The model has {limit} positions: generate at most that many tokens.")
        return self.embedding_norm(self.decoder.embed_tokens(token_ids) * self.embed_scale + positions)

    def project_kv(self, layer: Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalizes_before:
            hidden = layer.self_attn_layer_norm(hidden)
        attention = layer.self_attn
        width = attention.head_dim
        return split_heads(attention.k_proj(hidden), width), split_heads(attention.v_proj(hidden), width)

    def project_memory(self, layer: Block, encoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.encoder_attn
        width = attention.head_dim
        keys, values = attention.k_proj(encoder_hidden), attention.v_proj(encoder_hidden)
        return split_heads(keys, width), split_heads(values, width)

    def project(self, normalized: Tensor) -> Tensor:
        return self.model.lm_head(normalized) + self.output_bias
