"""A decoder run by ONNX Runtime: what `OnnxView` does for all kinds of models.

Layers and the head run as exported graphs. Embeddings, the heads that exits may have of their own, and what
only analysis asks for stay modules of torch.
"""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import Tensor

from models.backends.onnx.engine import Engine, Session
from models.backends.onnx.state import BoundSegment, BoundStep, Buffers, OnnxState
from models.backends.onnx.windows import Array, Biases, Window
from models.backends.shared import BackendView, Shelf
from models.decoder_view import DecoderView, advance_in_parts
from models.errors import UserError

MOST_KEPT = 4  # buffers of past generations
SMALLEST_BLOCK = 64  # query rows that attention takes at once, with 256 KiB of second-level cache


class OnnxView(BackendView):
    """See `models.decoder_view.DecoderView`: each kind of models adds `read`, `begin` and `deliver_cache`. B
    batch, Q new tokens, D model width."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.view)
        self.engine = engine
        self.mixes_windows = not engine.exact
        # Attention multiplies query rows in blocks, and a lone row in the last block by another kernel: where
        # a token must have the same bits in every window, none has more rows than the smallest block.
        width = self.eager.key_value_shape[1]
        self.most_rows = min(2 * width, SMALLEST_BLOCK) if engine.exact else sys.maxsize
        self.shelf = Shelf(self._make_buffers, most_kept=MOST_KEPT)
        self.biases: dict[int, Biases] = {}  # by capacity

    def keep_heads_apart(self) -> None:
        """Before anything is decoded: what was made for heads in groups is left."""
        self.engine.keep_heads_apart()
        self.shelf = Shelf(self._make_buffers, most_kept=MOST_KEPT)

    def run_layers(
        self, state: OnnxState, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        if not causal:
            raise UserError("backend onnx has causal windows only: leave out causal_catch_up=False.")
        self._reserve(state, len(hidden), state.lengths[start], hidden.shape[1])
        if hidden.shape[1] <= self.most_rows:
            made = self._run_window(state, hidden, start, stop)
        else:
            parts = hidden.split(self.most_rows, dim=1)
            windows = [self._run_window(state, part, start, stop) for part in parts]
            made = [torch.cat(outputs, dim=1) for outputs in zip(*windows, strict=True)]
        state.exit_states = made[1] if len(made) > 1 else None
        return made[0]

    def advance(self, state: OnnxState, hidden: Tensor, start: int, stop: int) -> tuple[Tensor, Array]:
        past = state.lengths[start]
        self._reserve(state, 1, past, 1)
        step = self._step(state.buffers, start, stop)
        if step is None:
            return advance_in_parts(cast(DecoderView, self), state, hidden, start, stop)
        for held in step.segment.layers:
            state.lengths[held] = past + 1
        hidden = step.run(hidden, self._window(state, past, 1, 1), state.source)
        adapter = self.eager.adapter_of(stop)
        if adapter is None:
            return hidden, step.row
        return hidden, adapter.complete(step.logits, self.eager.vocabulary)[0, 0].numpy()

    def read_exit(self, state: OnnxState, hidden: Tensor, layer: int) -> Tensor:
        """The exit adapter has run with the layers."""
        return hidden if state.exit_states is None else state.exit_states

    def _run_window(self, state: OnnxState, hidden: Tensor, start: int, stop: int) -> list[Tensor]:
        """What layers `start`..`stop - 1` make of (B, Q, D) states, and the exit adapter of that if it reads
        there."""
        past, new = state.lengths[start], hidden.shape[1]
        window = self._window(state, past, len(hidden), new)
        of_prompt = past + new < state.prompt_length  # whose last token is decoded like those to come
        stretches = self.engine.cuts.stretches(start, stop)
        if self.engine.branches(stop) and not self.engine.fuses(stop):
            stretches.append((self.num_layers, self.num_layers + 1))
        made = [hidden]
        for first, last in stretches:
            segment = self._segment(state.buffers, first, last, of_prompt)
            for layer in segment.layers:
                state.lengths[layer] = past + new
            outputs = segment.run(made[0], window, state.source)
            made = [made[0], *outputs] if first == self.num_layers else outputs
        return made

    def _segment(self, buffers: Buffers, start: int, stop: int, of_prompt: bool) -> BoundSegment:
        segment = buffers.segments.get((start, stop, of_prompt))
        if segment is None:
            self._drop_cut_segments(buffers)
            aside = [self.num_layers] if self.engine.fuses(stop) else []
            layers, session = [*range(start, stop), *aside], self.engine.layers(start, stop, of_prompt)
            segment = buffers.segments[start, stop, of_prompt] = BoundSegment(session, buffers, layers)
        return segment

    def _drop_cut_segments(self, buffers: Buffers) -> None:
        """Of these buffers and of those that wait for a generation: they hold sessions."""
        for held in (buffers, *(waiting for _, waiting in self.shelf.free)):
            for start, stop, of_prompt in [*held.segments]:
                if not self.engine.cuts.keeps(start, stop):
                    held.segments.pop((start, stop, of_prompt), None)  # another thread may have

    def write_kv(self, state: OnnxState, hidden: Tensor, start: int, stop: int) -> None:
        state.reserve(len(hidden), state.lengths[start] + hidden.shape[1] + 1)
        session = self.engine.keys_values(start, stop)
        given = {"hidden": hidden.contiguous().numpy(), **self._rotation(state, start, hidden)}
        made = session.run(None, {node.name: given[node.name] for node in session.get_inputs()})
        for index in range(start, stop):
            keys, values = made[2 * (index - start) : 2 * (index - start) + 2]
            state.write(index, torch.from_numpy(keys), torch.from_numpy(values))

    def predict(self, hidden: Tensor, layer: int) -> Tensor:
        adapter = self.eager.adapter_of(layer)
        if adapter is not None:
            return adapter.complete(self._head(self.engine.exit_head(), hidden), self.eager.vocabulary)
        return self._head(self.engine.head(), self.eager.apply_exit_head(hidden, layer))

    def _head(self, session: Session, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(1, -1, hidden.shape[-1]).numpy()
        logits = torch.from_numpy(session.run(None, {"hidden": flat})[0])
        return logits.view(*hidden.shape[:-1], -1)

    def _make_buffers(self, batch: int, capacity: int) -> Buffers:
        heads, width = self.eager.key_value_shape
        return Buffers(batch, capacity, len(self.eager.layers), heads, width, self.eager.lodgers)

    def _reserve(self, state: OnnxState, batch: int, past: int, new: int) -> None:
        """Make room for so many new tokens after `past` others, and for the rows that attention adds."""
        groups = self.engine.groups
        held = past + max(new, 2 if groups is None else groups.most_rows)
        if new > SMALLEST_BLOCK:  # a prompt: room for an answer, too, lest buffers be copied
            held += held // 4
        state.reserve(batch, held)

    def _step(self, buffers: Buffers, start: int, stop: int) -> BoundStep | None:
        """That of layers `start`..`stop - 1`; None where they are several graphs, or modules of torch read
        them."""
        if self.engine.cuts.heavy or self.eager.has_exit_head(stop):  # one may be attached at any time
            return None
        step = buffers.steps.get((start, stop))
        if step is None:
            head = self.engine.head() if self.eager.adapter_of(stop) is None else self.engine.exit_head()
            step = buffers.steps[start, stop] = BoundStep(self._segment(buffers, start, stop, False), head)
        return step

    def _window(self, state: OnnxState, past: int, batch: int, new: int) -> Window:
        """That of (B, Q) new tokens after `past` others."""
        # Long ones are as many as prompts have lengths: those go with the generation.
        windows = (state.numbering if new <= SMALLEST_BLOCK else state.own_numbering).windows
        groups = self.engine.groups
        grouped = groups is not None and groups.gains(new, past, self.most_rows)
        window = windows.get((new, grouped))
        if window is None:
            shape = (batch, new, self.eager.width)
            biases, exact = self._biases(state.capacity), self.engine.exact
            more = state.padding, state.tables(), groups, grouped
            window = windows[new, grouped] = Window(shape, biases, exact, *more)
        window.move(past)
        return window

    def _rotation(self, state: OnnxState, start: int, hidden: Tensor) -> dict[str, Array]:
        """By what keys of (B, Q, D) states are rotated, in families that rotate, after those that layer
        `start` holds."""
        tables, (batch, new, _) = state.tables(), hidden.shape
        if tables is None:
            return {}
        return {**tables.arrays, "places": state.lengths[start] + tables.places(batch, new, state.capacity)}

    def _biases(self, capacity: int) -> Biases:
        if capacity not in self.biases:
            owners = {self.eager.bias_owner(index) for index in range(len(self.eager.layers))}
            by_distance = {owner: self.eager.distance_bias(owner, capacity) for owner in sorted(owners)}
            self.biases[capacity] = Biases(by_distance, self.eager.bias_heads, capacity)
        return self.biases[capacity]
