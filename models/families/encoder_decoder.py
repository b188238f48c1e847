"""What the views of all encoder-decoder families share: state, source, the layers' inputs.

A family states how it embeds, what it projects, and how its layers are called where that differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from models.decoder_view import DecoderState, ModelInputs
from models.errors import UserError
from models.families.buffers import as_dynamic_cache, hand_over, make_buffers, refuse_uneven
from models.families.masks import prompt_padding, source_mask, step_mask
from models.families.stack import Block, StackView, states_of


class EncoderDecoderState(DecoderState):
    """S source tokens, P prompt tokens."""

    def __init__(
        self,
        num_layers: int,
        cache: EncoderDecoderCache | None,
        encoder_hidden: Tensor,
        attention_mask: Tensor | None,
        decoder_attention_mask: Tensor | None,
        lodgers: dict[int, int],
    ) -> None:
        super().__init__(num_layers, decoder_attention_mask)
        refuse_all_but_pairs(cache)
        given = cache if cache is not None and cache.get_seq_length() > 0 else None
        self.cache = EncoderDecoderCache(
            make_buffers(self.lengths, None if given is None else given.self_attention_cache, lodgers),
            # An empty one that was built from a config is sized by the encoder's depth.
            DynamicCache() if given is None else given.cross_attention_cache,
        )
        self.encoder_hidden = encoder_hidden  # (B, S, D)
        self.source_mask = source_mask(encoder_hidden, attention_mask)  # (B or 1, 1, 1, S)
        self.padding = prompt_padding(encoder_hidden, decoder_attention_mask)
        self.relative_bias: Tensor | None = None  # (1, H, N, N) of families that have one, N growing


class EncoderDecoderView(StackView):
    """Base of the views: a family adds `embed`, `project_kv` and `project`, and for exports
    `project_memory`, `embed_source` and `finish_source`."""

    encoder_layers: list[Block]
    encoder_heads: int
    exports_encoder = True

    def __init__(self, model: PreTrainedModel, layers: Iterable[Block], final_norm: nn.Module) -> None:
        super().__init__(model, model.get_decoder(), layers, final_norm)

    @property
    def bias_heads(self) -> int:
        return self.key_value_shape[0]

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return read_source(self, input_ids, attention_mask)

    def begin(
        self,
        cache: Cache | None,
        *,
        encoder_outputs: BaseModelOutput,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> EncoderDecoderState:
        self.check_cache(cache)
        given = encoder_outputs[0], attention_mask, decoder_attention_mask
        state = EncoderDecoderState(len(self.layers), cache, *given, self.lodgers)
        refuse_uneven(state.lengths)
        return state

    def step_inputs(self, state: EncoderDecoderState, start: int, new: int, causal: bool) -> dict[str, Any]:
        """What every layer is called with besides states and cache, for `new` tokens after those that layer
        `start` holds: masks, biases, encoder memory."""
        past = state.lengths[start]
        mask = step_mask(state.encoder_hidden, new, past, causal, state.padding)
        bias = self.bias_rows(state, past, past + new)
        return self.layer_inputs(state.encoder_hidden, mask, state.source_mask, bias)

    def bias_rows(self, state: EncoderDecoderState, past: int, total: int) -> Tensor | None:
        """Relative bias, where layers share one, of queries `past`..`total - 1`: (1, H, Q, total)."""
        return None

    def layer_inputs(
        self, encoder_hidden: Tensor, mask: Tensor | None, source_mask: Tensor, bias: Tensor | None
    ) -> dict[str, Any]:
        """Masks, relative bias and encoder memory under the names that layers have for them."""
        return {
            "attention_mask": mask,
            "encoder_hidden_states": encoder_hidden,
            "encoder_attention_mask": source_mask,
        }

    def embed(self, state: DecoderState, token_ids: Tensor) -> Tensor:
        """Embed the token ids that follow those of layer 0: (B, Q) -> (B, Q, D)."""
        raise NotImplementedError

    def project_kv(self, layer: Block, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What `layer`'s self-attention makes of its input: (B, Q, D) -> keys, values (B, H, Q, W)."""
        raise NotImplementedError

    def embed_source(self, token_ids: Tensor) -> Tensor:
        """What the encoder's first layer reads: (B, S) -> (B, S, D)."""
        raise NotImplementedError

    def finish_source(self, hidden: Tensor) -> Tensor:
        """What the encoder makes of its last layer's output, (B, S, D)."""
        raise NotImplementedError

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """The encoder's output for (B, S) ids and a mask that is 0 at padding."""
        return self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)

    def project_memory(self, layer: Block, encoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What `layer`'s cross-attention makes of the source: (B, S, D) -> keys, values (B, H, S, W)."""
        raise NotImplementedError

    def traced_inputs(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """The memory comes from elsewhere."""
        return {"attention_mask": None, "encoder_hidden_states": hidden}

    def traced_keys_values(
        self, index: int, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        return self.project_kv(self.layers[index], hidden)

    def apply_encoder_layer(self, layer: Block, hidden: Tensor) -> Tensor:
        """`layer` of the encoder on (B, S, D), exported likewise.

        Raises:
            UserError: an encoder whose attention cannot be exported.
        """
        return states_of(layer(hidden, None))

    def source_bias(self, index: int, length: int) -> Tensor | None:
        """Relative bias of source tokens for each other in encoder layer `index`: (1, H, S, S)."""
        return None

    def write_kv(self, state: EncoderDecoderState, hidden: Tensor, start: int, stop: int) -> None:
        for index in range(start, stop):
            keys, values = self.project_kv(self.layers[index], hidden)
            state.cache.self_attention_cache.update(keys, values, index)

    def deliver_cache(self, state: EncoderDecoderState, cache: Cache | None) -> EncoderDecoderCache:
        held = min(state.lengths[: self.num_layers])
        cross_attention = state.cache.cross_attention_cache if held > 0 else DynamicCache()
        del cross_attention.layers[self.num_layers :]  # an exit adapter's
        own = as_dynamic_cache(state.cache.self_attention_cache.layers[: self.num_layers], held)
        return hand_over(EncoderDecoderCache(own, cross_attention), cache)

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        return outputs.decoder_hidden_states

    def training_labels(self, labels: Tensor) -> Tensor:
        return labels


def read_source(view: Any, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
    """The source of a call, encoded by `view.encode`; what outputs start with is for the options to say."""
    encoder_outputs = view.encode(input_ids, attention_mask)
    return ModelInputs({"encoder_outputs": encoder_outputs, "attention_mask": attention_mask}, None)


def refuse_all_but_pairs(cache: Cache | None) -> None:
    """Raise UserError for a cache whose tensors are no plain keys/values of encoder and decoder."""
    if cache is None:
        return
    parts = getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)
    if not all(isinstance(part, DynamicCache) and not part.offloading for part in parts):
        raise UserError(
            "Only a cache of EncoderDecoderCache(DynamicCache(), DynamicCache()) can be continued or filled."
        )
