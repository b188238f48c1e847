"""Decoder-only models on ONNX Runtime."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache, DynamicCache

from models.backends.onnx.state import Buffers, OnnxState
from models.backends.onnx.view import OnnxView
from models.backends.onnx.windows import Tables
from models.backends.shared import Shelf, copied
from models.decoder_view import ModelInputs
from models.families.buffers import hand_over
from models.families.causal import CausalState, CausalView


class OnnxCausalState(OnnxState):
    """What the modules' own view has begun, which keeps positions and given embeddings: `begun`."""

    def __init__(self, shelf: Shelf[Buffers], view: CausalView, begun: CausalState) -> None:
        super().__init__(shelf, view, begun.prompt_mask, begun.padding)
        self.view = view
        self.begun = begun
        self.prompt_embeds = begun.prompt_embeds
        self.prompt_length = begun.numbered
        steps = begun.positions[0, 1:] - begun.positions[0, :-1]
        from_zero = int(begun.positions[0, 0]) == 0 and bool((steps == 1).all())
        self.usual_positions = self.usual_positions and len(begun.positions) == 1 and from_zero
        self.continue_from(begun.cache)
        del begun.cache  # whose keys/values are in the buffers now
        begun.lengths = self.lengths

    def tables(self) -> Tables | None:
        numbering = self.numbering
        if numbering.tables is None and self.view.rotary_width is not None:
            self.view.number_tokens(self.begun, self.capacity)
            rotations = {self.view.kinds.index(kind): table for kind, table in self.begun.tables.items()}
            numbering.tables = Tables.of(rotations, self.capacity)
        return numbering.tables


class OnnxCausalView(OnnxView):
    """P prompt tokens, others see `OnnxView`."""

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return self.eager.read(input_ids, attention_mask)

    def begin(
        self,
        cache: Cache | None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> OnnxCausalState:
        begun = self.eager.begin(
            cache, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return OnnxCausalState(self.shelf, self.eager, begun)

    def embed(self, state: OnnxCausalState, token_ids: Tensor) -> Tensor:
        return self.eager.embed(state.begun, token_ids)

    def deliver_cache(self, state: OnnxState, cache: Cache | None) -> DynamicCache:
        return hand_over(copied(state.held_by_all()), cache)
