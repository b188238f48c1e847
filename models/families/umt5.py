"""UMT5: T5 with relative attention biases of its own in every layer, which its attention computes itself."""

from __future__ import annotations

from typing import Any

from models.families.encoder_decoder import EncoderDecoderState, EncoderDecoderView
from models.families.t5 import T5View


class UMT5View(T5View):
    def step_inputs(self, state: EncoderDecoderState, start: int, new: int, causal: bool) -> dict[str, Any]:
        return EncoderDecoderView.step_inputs(self, state, start, new, causal)
