"""UMT5: T5 with relative attention biases of its own in every layer, which its attention computes itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from models.families.encoder_decoder import EncoderDecoderState, EncoderDecoderView
from models.families.stack import Block
from models.families.t5 import T5View


class UMT5View(T5View):
    takes_biases = False

    def layer_inputs(
        self, encoder_hidden: Tensor, mask: Tensor | None, source_mask: Tensor, bias: Tensor | None
    ) -> dict[str, Any]:
        return EncoderDecoderView.layer_inputs(self, encoder_hidden, mask, source_mask, bias)

    def bias_rows(self, state: EncoderDecoderState, past: int, total: int) -> Tensor | None:
        return None

    def traced_inputs(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        return EncoderDecoderView.traced_inputs(self, hidden, rotation)

    def apply_encoder_layer(self, layer: Block, hidden: Tensor) -> Tensor:
        return EncoderDecoderView.apply_encoder_layer(self, layer, hidden)

    def bias_owner(self, index: int) -> int:
        return index
