"""T5 family (T5, T5 v1.1, mT5, LongT5): relative attention biases, RMS norms before each sub-layer.

`T5View(model)` drives the blocks of an unmodified `T5ForConditionalGeneration`; see `DecoderView`. LongT5's
sparse attention concerns the encoder alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.decoder_view import DecoderState
from models.errors import UserError
from models.families.encoder_decoder import EncoderDecoderState, EncoderDecoderView
from models.families.stack import Block, split_pair

INITIAL_BIAS_LENGTH = 64


class T5View(EncoderDecoderView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        super().__init__(model, decoder.block, nn.Sequential(decoder.final_layer_norm, decoder.dropout))
        self.key_value_shape = (model.config.num_heads, model.config.d_kv)
        self.encoder_heads = model.config.num_heads
        self.encoder_layers = list(model.get_encoder().block)
        self.exports_encoder = not hasattr(model.config, "encoder_attention_type")  # LongT5's is sparse
        # mT5 has no such setting: it never scales.
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        self.output_scale = model.config.d_model**-0.5 if scaled else None

    def embed(self, state: DecoderState, token_ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(token_ids)

    def layer_inputs(
        self, encoder_hidden: Tensor, mask: Tensor | None, source_mask: Tensor, bias: Tensor | None
    ) -> dict[str, Any]:
        return {
            "attention_mask": mask,
            "position_bias": bias,
            "encoder_hidden_states": encoder_hidden,
            "encoder_decoder_position_bias": source_mask,
        }

    def project_kv(self, layer: Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normalized = layer.layer[0].layer_norm(hidden)
        attention = layer.layer[0].SelfAttention
        return split_pair(attention.k(normalized), attention.v(normalized), attention.key_value_proj_dim)

    def drop_feed_forward(self, layer: Block) -> None:
        layer.layer[-1] = nn.Identity()

    def embed_source(self, token_ids: Tensor) -> Tensor:
        return self.model.get_encoder().embed_tokens(token_ids)

    def finish_source(self, hidden: Tensor) -> Tensor:
        return self.model.get_encoder().final_layer_norm(hidden)

    def project_memory(self, layer: Block, encoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.layer[1].EncDecAttention
        keys, values = attention.k(encoder_hidden), attention.v(encoder_hidden)
        return split_pair(keys, values, attention.key_value_proj_dim)

    def project(self, normalized: Tensor) -> Tensor:
        if self.output_scale is not None:
            normalized = normalized * self.output_scale
        return self.model.lm_head(normalized)

    def bias_rows(self, state: EncoderDecoderState, past: int, total: int) -> Tensor | None:
        """Block 0 owns the bias, all layers share it, and the state keeps it, (1, H, N, N), for the steps to
        come."""
        bias = state.relative_bias
        if bias is None or total > bias.shape[-1]:
            length = max(INITIAL_BIAS_LENGTH, 2 * total)
            attention = self.layers[0].layer[0].SelfAttention
            bias = state.relative_bias = attention.compute_bias(length, length)
        return bias[:, :, past:total, :total]

    def traced_inputs(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        unread = hidden.new_zeros(1)  # lest layers compute biases
        return super().traced_inputs(hidden, rotation) | {
            "position_bias": unread,
            "encoder_decoder_position_bias": unread,
        }

    def apply_encoder_layer(self, layer: Block, hidden: Tensor) -> Tensor:
        if not self.exports_encoder:
            raise UserError("LongT5's sparse encoder attention cannot be exported: run its encoder in torch.")
        return layer(hidden, position_bias=hidden.new_zeros(1))[0]

    def distance_bias(self, index: int, length: int) -> Tensor:
        attention = self.layers[self.bias_owner(index)].layer[0].SelfAttention
        return attention.compute_bias(1, length, past_seen_tokens=length - 1)[0, :, 0].flip(-1)

    def source_bias(self, index: int, length: int) -> Tensor:
        attention = self.encoder_layers[self.bias_owner(index)].layer[0].SelfAttention
        return attention.compute_bias(length, length)
