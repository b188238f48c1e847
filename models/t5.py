"""T5 family (T5, T5 v1.1, mT5): relative attention biases, RMS norms before each sub-layer.

`T5View(model)` drives the blocks of an unmodified `T5ForConditionalGeneration`; see `DecoderView`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from models.decoder_view import causal_mask_

INITIAL_BIAS_LENGTH = 64


@dataclass
class T5State:
    """What one generation adds to the model: S source tokens, H heads."""

    cache: EncoderDecoderCache
    encoder_hidden: Tensor  # (B, S, D)
    cross_bias: Tensor  # (B or 1, H or 1, 1, S) additive: 0 at real source tokens
    relative_bias: Tensor  # (1, H, N, N), N >= number of tokens so far


class T5View:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.blocks = list(self.decoder.block)  # slicing a ModuleList would build a new module
        self.num_layers = len(self.blocks)
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
        # A cache built from the config is sized by the encoder's depth, so an empty one is replaced.
        if cache is None or cache.get_seq_length() == 0:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cross_bias = self._cross_bias(encoder_hidden, attention_mask)
        return T5State(cache, encoder_hidden, cross_bias, self._relative_bias(INITIAL_BIAS_LENGTH))

    def embed(self, state: T5State, token_ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(token_ids)

    def run_layers(
        self, state: T5State, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        past, new = self.cached_length(state, start), hidden.shape[1]
        position_bias = self._bias_rows(state, past, past + new)
        # A single query sees all keys. For more, the mask must be explicit: without one, attention kernels
        # would assume that the first query stands at position 0.
        mask = None if new == 1 else self._catch_up_mask(position_bias, past, causal)
        for block in self.blocks[start:stop]:
            hidden = block(
                hidden,
                attention_mask=mask,
                position_bias=position_bias,
                encoder_hidden_states=state.encoder_hidden,
                encoder_decoder_position_bias=state.cross_bias,
                past_key_values=state.cache,
            )[0]
        return hidden

    def write_kv(self, state: T5State, hidden: Tensor, start: int, stop: int) -> None:
        for index in range(start, stop):
            self_attention = self.blocks[index].layer[0]
            normalized = self_attention.layer_norm(hidden)
            attention = self_attention.SelfAttention
            shape = (*hidden.shape[:2], -1, attention.key_value_proj_dim)
            keys = attention.k(normalized).view(shape).transpose(1, 2)  # (B, H, Q, D / H)
            values = attention.v(normalized).view(shape).transpose(1, 2)
            state.cache.self_attention_cache.update(keys, values, index)

    def cached_length(self, state: T5State, layer: int) -> int:
        return state.cache.self_attention_cache.get_seq_length(layer)

    def truncate(self, state: T5State, length: int) -> None:
        for layer in state.cache.self_attention_cache.layers:
            if layer.is_initialized and layer.get_seq_length() > length:
                layer.keys = layer.keys[:, :, :length]
                layer.values = layer.values[:, :, :length]

    def normalize(self, hidden: Tensor) -> Tensor:
        return self.decoder.dropout(self.decoder.final_layer_norm(hidden))

    def project(self, normalized: Tensor) -> Tensor:
        if self.output_scale is not None:
            normalized = normalized * self.output_scale
        return self.model.lm_head(normalized)

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        return outputs.decoder_hidden_states

    def _relative_bias(self, length: int) -> Tensor:
        """Relative position bias, which block 0 owns and all layers share: (1, H, length, length)."""
        attention = self.blocks[0].layer[0].SelfAttention
        return attention.compute_bias(length, length, device=attention.relative_attention_bias.weight.device)

    def _bias_rows(self, state: T5State, past: int, total: int) -> Tensor:
        """Bias of queries `past`..`total - 1` over keys 0..`total - 1`: (1, H, Q, total)."""
        if total > state.relative_bias.shape[-1]:
            state.relative_bias = self._relative_bias(2 * total)
        return state.relative_bias[:, :, past:total, :total]

    def _catch_up_mask(self, bias: Tensor, past: int, causal: bool) -> Tensor:
        """Additive mask over (1, H, Q, K) scores: causal among the Q new tokens, or none at all."""
        new, total = bias.shape[-2:]
        mask = bias.new_zeros(new, total)
        return causal_mask_(mask, past)[None, None] if causal else mask[None, None]

    def _cross_bias(self, encoder_hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Additive source mask; always a tensor, lest every layer allocate zeros at every step."""
        batch, source = encoder_hidden.shape[:2]
        if attention_mask is None:
            return encoder_hidden.new_zeros(1, 1, 1, source)
        blocked = attention_mask[:, None, None, :] == 0
        bias = encoder_hidden.new_zeros(batch, 1, 1, source)
        return bias.masked_fill(blocked, torch.finfo(bias.dtype).min)
