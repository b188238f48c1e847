"""T5 family (T5, T5 v1.1, mT5, LongT5): relative attention biases, RMS norms before each sub-layer.

`T5View(model)` drives the blocks of an unmodified `T5ForConditionalGeneration`; see `DecoderView`. LongT5's
sparse attention concerns the encoder alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from models.decoder_view import CACHE_KEYWORD
from models.encoder_decoder import EncoderDecoderView, catch_up_mask, own_cache, source_mask, split_heads

INITIAL_BIAS_LENGTH = 64


@dataclass
class T5State:
    """What one generation adds to the model: S source tokens, H heads."""

    cache: EncoderDecoderCache
    encoder_hidden: Tensor  # (B, S, D)
    cross_bias: Tensor  # (B or 1, 1, 1, S) additive: 0 at real source tokens
    relative_bias: Tensor  # (1, H, N, N), N >= number of tokens so far


class T5View(EncoderDecoderView):
    def __init__(self, model: PreTrainedModel) -> None:
        decoder = model.get_decoder()
        super().__init__(model, decoder.block, nn.Sequential(decoder.final_layer_norm, decoder.dropout))
        # mT5 has no such setting: it never scales.
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        self.output_scale = model.config.d_model**-0.5 if scaled else None

    def begin(
        self,
        cache: Cache | None,
        *,
        encoder_outputs: Any,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> T5State:
        encoder_hidden = encoder_outputs[0]
        cross_bias = source_mask(encoder_hidden, attention_mask)
        return T5State(own_cache(cache), encoder_hidden, cross_bias, self._relative_bias(INITIAL_BIAS_LENGTH))

    def embed(self, state: T5State, token_ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(token_ids)

    def run_layers(
        self, state: T5State, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        past, new = self.cached_length(state, start), hidden.shape[1]
        position_bias = self._bias_rows(state, past, past + new)
        mask = catch_up_mask(state.encoder_hidden, new, past, causal)
        for block in self.layers[start:stop]:
            hidden = block(
                hidden,
                attention_mask=mask,
                position_bias=position_bias,
                encoder_hidden_states=state.encoder_hidden,
                encoder_decoder_position_bias=state.cross_bias,
                **{CACHE_KEYWORD: state.cache},
            )[0]
        return hidden

    def project_kv(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normalized = layer.layer[0].layer_norm(hidden)
        attention = layer.layer[0].SelfAttention
        width = attention.key_value_proj_dim
        return split_heads(attention.k(normalized), width), split_heads(attention.v(normalized), width)

    def project(self, normalized: Tensor) -> Tensor:
        if self.output_scale is not None:
            normalized = normalized * self.output_scale
        return self.model.lm_head(normalized)

    def _relative_bias(self, length: int) -> Tensor:
        """Relative position bias, which block 0 owns and all layers share: (1, H, length, length)."""
        attention = self.layers[0].layer[0].SelfAttention
        return attention.compute_bias(length, length, device=attention.relative_attention_bias.weight.device)

    def _bias_rows(self, state: T5State, past: int, total: int) -> Tensor:
        """Bias of queries `past`..`total - 1` over keys 0..`total - 1`: (1, H, Q, total)."""
        if total > state.relative_bias.shape[-1]:
            state.relative_bias = self._relative_bias(2 * total)
        return state.relative_bias[:, :, past:total, :total]
