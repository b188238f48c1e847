"""What the views of all encoder-decoder families share: caches, source masks, heads of intermediate exits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from models.decoder_view import causal_mask_


class EncoderDecoderState(Protocol):
    cache: EncoderDecoderCache
    encoder_hidden: Tensor  # (B, S, D)


class EncoderDecoderView:
    """Base of the views: a family adds `begin`, `embed`, `run_layers`, `project_kv` and `project`."""

    output_scale: float | None = None  # of the LM head's input
    output_bias: Tensor | None = None  # (1, V), added to its output

    def __init__(self, model: PreTrainedModel, layers: Iterable[nn.Module], final_norm: nn.Module) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.layers = list(layers)  # slicing a ModuleList would build a new module
        self.num_layers = len(self.layers)
        self.final_norm = final_norm
        heads = getattr(model, "per_exit_heads", {})
        self.per_exit_heads = {int(layer): heads[layer] for layer in heads}

    def project_kv(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What `layer`'s self-attention makes of its input: (B, Q, D) -> keys, values (B, H, Q, D / H)."""
        raise NotImplementedError

    def write_kv(self, state: EncoderDecoderState, hidden: Tensor, start: int, stop: int) -> None:
        for index in range(start, stop):
            keys, values = self.project_kv(self.layers[index], hidden)
            state.cache.self_attention_cache.update(keys, values, index)

    def cached_length(self, state: EncoderDecoderState, layer: int) -> int:
        return state.cache.self_attention_cache.get_seq_length(layer)

    def truncate(self, state: EncoderDecoderState, length: int) -> None:
        for layer in state.cache.self_attention_cache.layers:
            if layer.is_initialized and layer.get_seq_length() > length:
                layer.keys = layer.keys[:, :, :length]
                layer.values = layer.values[:, :, :length]

    def normalize(self, hidden: Tensor, layer: int) -> Tensor:
        if layer in self.per_exit_heads:
            hidden = self.per_exit_heads[layer](hidden)
        return self.final_norm(hidden)

    def projection_onto(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        weight = self.model.get_output_embeddings().weight.detach()[token_ids]  # (K, D), copied
        scale, bias = self.output_scale, self.output_bias
        weight = weight if scale is None else weight * scale
        bias = None if bias is None else bias.detach().flatten()[token_ids]
        return lambda normalized: F.linear(normalized, weight, bias)

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        return outputs.decoder_hidden_states


def split_heads(projected: Tensor, head_width: int) -> Tensor:
    """(B, Q, H * W) -> (B, H, Q, W)."""
    return projected.unflatten(-1, (-1, head_width)).transpose(1, 2)


def own_cache(cache: Cache | None) -> EncoderDecoderCache:
    """The given cache if it holds anything; else a new one, as one built from a config is sized by the
    encoder's depth."""
    if cache is None or cache.get_seq_length() == 0:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return cache


def source_mask(encoder_hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Additive mask of padded source tokens, 0 at real ones: (B or 1, 1, 1, S).

    Always a tensor, lest every layer allocate zeros at every step.
    """
    batch, source = encoder_hidden.shape[:2]
    if attention_mask is None:
        return encoder_hidden.new_zeros(1, 1, 1, source)
    mask = encoder_hidden.new_zeros(batch, 1, 1, source)
    return mask.masked_fill(attention_mask[:, None, None, :] == 0, torch.finfo(mask.dtype).min)


def catch_up_mask(like: Tensor, new: int, past: int, causal: bool) -> Tensor | None:
    """Additive mask for `new` = Q tokens after `past` cached ones: (1, 1, Q, past + Q), typed as `like`.

    A single query sees all keys: None. For more, the mask must be explicit: without one, attention kernels
    would assume that the first query stands at position 0.
    """
    if new == 1:
        return None
    mask = like.new_zeros(new, past + new)
    return causal_mask_(mask, past)[None, None] if causal else mask[None, None]
