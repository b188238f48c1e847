"""Encoder-decoder models on ONNX Runtime: the encoder and what decoder layers make of it are graphs, too."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from models.backends.onnx.engine import Engine
from models.backends.onnx.state import OnnxState, Source
from models.backends.onnx.view import OnnxView
from models.backends.onnx.windows import shared
from models.backends.shared import deliver_copies
from models.decoder_view import ModelInputs
from models.families.buffers import refuse_uneven
from models.families.encoder_decoder import read_source, refuse_all_but_pairs
from models.families.masks import prompt_padding


class OnnxEncoderDecoderView(OnnxView):
    """B batch, S source tokens, D model width."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.source_biases: dict[int, Tensor] = {}  # (1, H, S, S) by owner, S growing

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return read_source(self, input_ids, attention_mask)

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
        refuse_all_but_pairs(cache)
        self.eager.check_cache(cache)
        hidden = encoder_outputs[0]
        mask = torch.ones(hidden.shape[:2]) if attention_mask is None else attention_mask
        made = self.engine.memory().run_with_ort_values(None, {"hidden": shared(hidden.contiguous().numpy())})
        memory = list(zip(made[::2], made[1::2], strict=True))
        padding = prompt_padding(hidden, decoder_attention_mask)
        state = OnnxState(self.shelf, self.eager, decoder_attention_mask, padding)
        state.source = Source(shared(mask.int().contiguous().numpy()), memory)
        own = getattr(cache, "self_attention_cache", None)
        if own is not None:
            state.continue_from(own)
        refuse_uneven(state.lengths)
        return state

    def deliver_cache(self, state: OnnxState, cache: Cache | None) -> EncoderDecoderCache:
        held = state.held_by_all()
        assert state.source is not None
        return deliver_copies(held, state.source.pairs if held else [], cache)

    def _source_bias(self, owner: int, length: int) -> Tensor:
        """(1, H, S, S) of a family that has some; those of the longest source so far are kept."""
        kept = self.source_biases.get(owner)
        if kept is None or kept.shape[-1] < length:
            bias = self.eager.source_bias(owner, length)
            assert bias is not None
            kept = self.source_biases[owner] = bias.detach()
        return kept[:, :, :length, :length].contiguous()
