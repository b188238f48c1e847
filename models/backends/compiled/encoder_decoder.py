"""Encoder-decoder models run by `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from models.backends.compiled.segment import Given, Source, Window, additive
from models.backends.compiled.state import CompiledState, Held
from models.backends.compiled.view import CompiledView
from models.backends.shared import Shelf, deliver_copies
from models.decoder_view import ModelInputs
from models.families.encoder_decoder import EncoderDecoderState, EncoderDecoderView, read_source

SOURCE_STEP = 64  # rooms for source tokens are multiples, lest every length compile anew


class CompiledEncoderDecoderState(CompiledState):
    """Of B rows and S source tokens."""

    def __init__(self, shelf: Shelf[Held], layers: int, begun: EncoderDecoderState) -> None:
        super().__init__(shelf, layers, begun.prompt_mask, begun.padding)
        batch, self.source_length, _ = begun.encoder_hidden.shape
        self.memory = self.lend(batch, -(-self.source_length // SOURCE_STEP) * SOURCE_STEP)
        self.memory.padding[:, self.source_length :] = True
        self.memory.padding[:, : self.source_length] = begun.source_mask[:, 0, 0] != 0
        self.continue_from(begun.cache.self_attention_cache)


class CompiledEncoderDecoderView(CompiledView):
    """See `CompiledView`. S source tokens."""

    def __init__(self, eager: EncoderDecoderView, compiler: str | Callable[..., Any] = "inductor") -> None:
        super().__init__(eager, compiler)
        self.biases: dict[int, Tensor | None] = {}  # (H, N) by capacity

    @staticmethod
    def layer_inputs(eager: EncoderDecoderView, window: Window, given: Given) -> dict[str, Any]:
        assert given.source is not None
        mask = additive(window.unseen, window.hidden)
        source_mask = additive(given.source.padding[:, None, None], window.hidden)
        bias = None
        if given.bias is not None:
            bias = given.bias[:, window.distance.clamp(min=0)][None]  # (1, H, Q, N)
        return eager.layer_inputs(window.hidden, mask, source_mask, bias)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return read_source(self, input_ids, attention_mask)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """The encoder's output for (B, S) ids and a mask that is 0 at padding."""
        return self.eager.encode(input_ids, attention_mask)

    @torch.inference_mode()
    def begin(
        self,
        cache: Cache | None,
        *,
        encoder_outputs: BaseModelOutput,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> CompiledEncoderDecoderState:
        begun = self.eager.begin(
            cache,
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
        )
        state = CompiledEncoderDecoderState(self.shelf, len(self.eager.layers), begun)
        for index, layer in enumerate(self.eager.layers):  # as layers would at their first step
            state.memory.write(index, 0, *self.eager.project_memory(layer, begun.encoder_hidden))
        return state

    @torch.inference_mode()
    def write_kv(self, state: CompiledState, hidden: Tensor, start: int, stop: int) -> None:
        for index in range(start, stop):
            state.write(index, *self.eager.project_kv(self.eager.layers[index], hidden))

    def deliver_cache(self, state: CompiledEncoderDecoderState, cache: Cache | None) -> EncoderDecoderCache:
        kept, own = state.source_length, [*state.held_by_all(self.num_layers)]
        memory = state.memory.pairs[: self.num_layers] if own else []
        source = ((keys[:, :, :kept], values[:, :, :kept]) for keys, values in memory)
        return deliver_copies(own, source, cache)

    def given(self, state: CompiledEncoderDecoderState, start: int, stop: int) -> Given:
        own, memory = state.buffers, state.memory
        source = Source(memory.pairs[start:stop], memory.padding)
        return Given(own.pairs[start:stop], own.padding, source, self._bias(own.capacity))

    def _bias(self, capacity: int) -> Tensor | None:
        """(H, N) of families whose layers share one relative bias."""
        if capacity not in self.biases:
            shared = len({self.eager.bias_owner(index) for index in range(self.num_layers)}) == 1
            with torch.inference_mode(False), torch.no_grad():
                bias = self.biases[capacity] = self.eager.distance_bias(0, capacity) if shared else None
            if bias is not None:
                torch._dynamo.mark_static_address(bias)
        return self.biases[capacity]
