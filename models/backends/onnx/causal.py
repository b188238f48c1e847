"""Decoder-only models on ONNX Runtime."""

from __future__ import annotations

from transformers import Cache, DynamicCache

from models.backends.causal import CausalBackend, take_over
from models.backends.onnx.state import Buffers, OnnxState
from models.backends.onnx.view import OnnxView
from models.backends.onnx.windows import Tables
from models.backends.shared import Shelf, copied
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
        take_over(self, begun)

    def tables(self) -> Tables | None:
        numbering = self.numbering
        if numbering.tables is None and self.view.rotary_width is not None:
            self.view.number_tokens(self.begun, self.capacity)
            rotations = {self.view.kinds.index(kind): table for kind, table in self.begun.tables.items()}
            numbering.tables = Tables.of(rotations, self.capacity)
        return numbering.tables


class OnnxCausalView(CausalBackend, OnnxView):
    """P prompt tokens, others see `OnnxView`."""

    def hold(self, begun: CausalState) -> OnnxCausalState:
        return OnnxCausalState(self.shelf, self.eager, begun)

    def deliver_cache(self, state: OnnxState, cache: Cache | None) -> DynamicCache:
        return hand_over(copied(state.held_by_all()), cache)
