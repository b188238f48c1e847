"""Decoder-only models run by `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from models.backends.causal import CausalBackend, take_over
from models.backends.compiled.segment import Given, Window, additive
from models.backends.compiled.state import CompiledState, Held
from models.backends.compiled.view import CompiledView, with_own_strides
from models.backends.shared import Pair, Shelf, copied
from models.families.buffers import hand_over
from models.families.causal import CausalState, CausalView


class CompiledCausalState(CompiledState):
    """What the modules' own view has begun, which keeps positions and given embeddings: `begun`."""

    def __init__(self, shelf: Shelf[Held], view: CausalView, begun: CausalState) -> None:
        super().__init__(shelf, len(view.layers), begun.prompt_mask, begun.padding)
        self.view = view
        self.begun = begun
        self.prompt_embeds = begun.prompt_embeds
        self.made_tables: tuple[int, dict[str, Pair]] = (0, {})  # by which capacity
        take_over(self, begun)

    def tables(self) -> dict[str, Pair]:
        """Cosines and sines of all positions, (B or 1, N, W) by kind of layer, of families that rotate."""
        if self.made_tables[0] != self.capacity:
            self.view.number_tokens(self.begun, self.capacity)
            tables = {kind: table for kind, table in self.begun.tables.items() if table is not None}
            self.made_tables = (
                self.capacity,
                {kind: (self._cut(cosines), self._cut(sines)) for kind, (cosines, sines) in tables.items()},
            )
        return self.made_tables[1]

    def _cut(self, table: Tensor) -> Tensor:
        return with_own_strides(table[:, : self.capacity])


class CompiledCausalView(CausalBackend, CompiledView):
    """See `CompiledView`. P prompt tokens."""

    @staticmethod
    def layer_inputs(eager: CausalView, window: Window, given: Given) -> dict[str, Any]:
        inputs, tables = {}, given.tables or {}
        for kind, reach in eager.windows.items():
            unseen = window.unseen if reach is None else window.unseen | (window.distance >= reach)
            table = [part[:, window.positions] for part in tables.get(kind, ())]  # (B or 1, Q, W)
            mask = additive(unseen, window.hidden)
            inputs[kind] = eager.layer_inputs(table, mask, 0, window.hidden.shape[1])
        return inputs

    @torch.inference_mode()
    def hold(self, begun: CausalState) -> CompiledCausalState:
        return CompiledCausalState(self.shelf, self.eager, begun)

    @torch.inference_mode()
    def write_kv(self, state: CompiledCausalState, hidden: Tensor, start: int, stop: int) -> None:
        if start == stop:
            return
        inputs = self.eager.step_inputs(state.begun, start, hidden.shape[1], True)
        for index in range(start, stop):
            layer, given = self.eager.layers[index], self.eager.inputs_of(inputs, index)
            state.write(index, *self.eager.project_kv(layer, hidden, given))

    def deliver_cache(self, state: CompiledState, cache: Cache | None) -> DynamicCache:
        return hand_over(copied(state.held_by_all(self.num_layers)), cache)

    def given(self, state: CompiledCausalState, start: int, stop: int) -> Given:
        own = state.buffers
        return Given(own.pairs[start:stop], own.padding, tables=state.tables())
