"""A decoder run by ONNX Runtime: `OnnxView` serves loop, policies and measures as a family's own view does.

Layers, encoder, cross-attention memory and the head run as exported graphs. Embeddings, the heads that exits
may have of their own, and what only analysis asks for stay modules of torch.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from models.backends.onnx.engine import Engine
from models.backends.onnx.state import BoundSegment, Buffers, OnnxState, Source
from models.backends.onnx.windows import Biases, Window, shared
from models.backends.shared import BackendView, Shelf, deliver_copies
from models.errors import UserError
from models.families.buffers import refuse_uneven
from models.families.encoder_decoder import refuse_other_caches
from models.families.masks import padding_mask

MOST_KEPT = 4  # buffers of past generations
SMALLEST_BLOCK = 64  # query rows that attention takes at once, with 256 KiB of second-level cache


class OnnxView(BackendView):
    """See `models.decoder_view.DecoderView`. B batch, Q new tokens, S source tokens, D model width."""

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
        self.source_biases: dict[int, Tensor] = {}  # (1, H, S, S) by owner, S growing

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """The encoder's output for (B, S) ids and a mask that is 0 at padding."""
        if not self.eager.exports_encoder:
            return self.eager.encode(input_ids, attention_mask)
        with torch.no_grad():
            hidden, length = self.eager.embed_source(input_ids), input_ids.shape[1]
            session = self.engine.encoder()
            feeds = {"hidden": hidden.numpy(), "source_mask": attention_mask.int().numpy()}
            for node in session.get_inputs():
                if node.name.startswith("bias."):
                    feeds[node.name] = self._source_bias(int(node.name.removeprefix("bias.")), length).numpy()
            hidden = torch.from_numpy(session.run(None, feeds)[0])
            return BaseModelOutput(last_hidden_state=self.eager.finish_source(hidden))

    def begin(
        self,
        cache: Cache | None,
        *,
        encoder_outputs: BaseModelOutput,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> OnnxState:
        refuse_other_caches(cache)
        hidden = encoder_outputs[0]
        mask = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        made = self.engine.memory().run_with_ort_values(None, {"hidden": shared(hidden.contiguous().numpy())})
        padding = None
        if decoder_attention_mask is not None and not bool(decoder_attention_mask.all()):
            padding = padding_mask(hidden, decoder_attention_mask).numpy()
        memory = list(zip(made[::2], made[1::2], strict=True))
        source = Source(shared(mask.int().contiguous().numpy()), memory)
        state = OnnxState(self.shelf, self.num_layers, len(hidden), source, padding)
        state.prompt_mask = decoder_attention_mask
        own = getattr(cache, "self_attention_cache", None)
        if own is not None and own.get_seq_length() > 0:
            state.reserve(own.get_seq_length() + 1)
            for index in range(self.num_layers):
                state.write(index, own.layers[index].keys, own.layers[index].values)
        refuse_uneven(state.lengths)
        return state

    def run_layers(
        self, state: OnnxState, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        if not causal:
            raise UserError("backend onnx has causal windows only: leave out causal_catch_up=False.")
        if hidden.shape[1] <= self.most_rows:
            return self._run_window(state, hidden, start, stop)
        parts = hidden.split(self.most_rows, dim=1)
        return torch.cat([self._run_window(state, part, start, stop) for part in parts], dim=1)

    def _run_window(self, state: OnnxState, hidden: Tensor, start: int, stop: int) -> Tensor:
        past, new = state.lengths[start], hidden.shape[1]
        window = self._window(state, past, new)
        window.move(past)
        segments = state.buffers.segments
        segment = segments.get((start, stop))
        if segment is None:
            segment = BoundSegment(self.engine.layers(start, stop), state.buffers, start, stop)
            segments[start, stop] = segment
        state.lengths[start:stop] = [past + new] * (stop - start)
        return segment.run(hidden, window, state.source)

    def write_kv(self, state: OnnxState, hidden: Tensor, start: int, stop: int) -> None:
        state.reserve(state.lengths[start] + hidden.shape[1] + 1)
        made = self.engine.keys_values(start, stop).run(None, {"hidden": hidden.numpy()})
        for index in range(start, stop):
            keys, values = made[2 * (index - start) : 2 * (index - start) + 2]
            state.write(index, torch.from_numpy(keys), torch.from_numpy(values))

    def deliver_cache(self, state: OnnxState, cache: Cache | None) -> EncoderDecoderCache:
        held = min(state.lengths)
        buffers, memory = (state.buffers.pairs, state.source.pairs) if held > 0 else ([], [])
        own = ((keys[:, :, :held], values[:, :, :held]) for keys, values in buffers)
        return deliver_copies(own, memory, cache)

    def predict(self, hidden: Tensor, layer: int) -> Tensor:
        hidden = self.eager.apply_exit_head(hidden, layer)
        flat = hidden.reshape(1, -1, hidden.shape[-1]).numpy()
        logits = torch.from_numpy(self.engine.head().run(None, {"hidden": flat})[0])
        return logits.view(*hidden.shape[:-1], -1)

    def _make_buffers(self, batch: int, capacity: int) -> Buffers:
        return Buffers(self.num_layers, batch, *self.eager.key_value_shape, capacity)

    def _window(self, state: OnnxState, past: int, new: int) -> Window:
        state.reserve(past + max(new, 2))
        window = state.windows.get(new)
        if window is None:
            biases = self._biases(state.buffers.capacity)
            window = state.windows[new] = Window(
                state.batch_size, new, self.eager.width, biases, state.padding, self.engine.exact
            )
        return window

    def _biases(self, capacity: int) -> Biases:
        if capacity not in self.biases:
            owners = {self.eager.bias_owner(index) for index in range(self.num_layers)}
            by_distance = {owner: self.eager.distance_bias(owner, capacity) for owner in sorted(owners)}
            self.biases[capacity] = Biases(by_distance, self.eager.key_value_shape[0], capacity)
        return self.biases[capacity]

    def _source_bias(self, owner: int, length: int) -> Tensor:
        """(1, H, S, S) of a family that has some; those of the longest source so far are kept."""
        kept = self.source_biases.get(owner)
        if kept is None or kept.shape[-1] < length:
            bias = self.eager.source_bias(owner, length)
            assert bias is not None
            kept = self.source_biases[owner] = bias.detach()
        return kept[:, :, :length, :length].contiguous()
