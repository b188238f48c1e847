"""UMT5: T5 with relative attention biases of its own in every layer, which its attention computes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from models.decoder_view import CACHE_KEYWORD
from models.encoder_decoder import catch_up_mask, own_cache, source_mask
from models.t5 import T5View


@dataclass
class UMT5State:
    cache: EncoderDecoderCache
    encoder_hidden: Tensor  # (B, S, D)
    cross_mask: Tensor  # (B or 1, 1, 1, S) additive


class UMT5View(T5View):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # Up to transformers 5.23, which had no such setting, tied embeddings (all of its UMT5) meant scaling.
        scaled = getattr(model.config, "scale_decoder_outputs", model.config.tie_word_embeddings)
        self.output_scale = model.config.d_model**-0.5 if scaled else None

    def begin(
        self,
        cache: Cache | None,
        *,
        encoder_outputs: Any,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> UMT5State:
        encoder_hidden = encoder_outputs[0]
        return UMT5State(own_cache(cache), encoder_hidden, source_mask(encoder_hidden, attention_mask))

    def run_layers(
        self, state: UMT5State, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        past = self.cached_length(state, start)
        mask = catch_up_mask(state.encoder_hidden, hidden.shape[1], past, causal)
        for block in self.layers[start:stop]:
            hidden = block(
                hidden,
                attention_mask=mask,
                encoder_hidden_states=state.encoder_hidden,
                encoder_attention_mask=state.cross_mask,
                **{CACHE_KEYWORD: state.cache},
            )
        return hidden
