"""What each layer would have predicted for tokens that are already there: one parallel pass, for analysis.

    trace = trace_layers(model, inputs.input_ids, inputs.attention_mask, model.generate(**inputs))

FREE's synchronized parallel decoding sees exactly these shallow states; under CALM's state copying and
Static-Exiting they are what exact keys/values would give.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.confidence import ConfidenceMeasure, SoftmaxGap
from models.families import view_for


@dataclass
class LayerTrace:
    """B rows, T generated tokens, L layers; the last layer's entries are the full model's."""

    confidences: Tensor  # (B, T, L)
    tokens: Tensor  # (B, T, L) the most probable token after each layer

    @property
    def agrees(self) -> Tensor:
        """Whether each layer's prediction is the last one's: (B, T, L)."""
        return self.tokens == self.tokens[..., -1:]


@torch.inference_mode()
def trace_layers(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sequences: Tensor,
    confidence: ConfidenceMeasure | None = None,
) -> LayerTrace:
    """Read every layer's prediction of the tokens of `sequences`, each given those before it.

    Args:
        input_ids: (B, S) source or, of decoder-only models, prompt; `attention_mask` (B, S) marks its real
            tokens.
        sequences: what `generate` returns: (B, P + T) prompt or start token, P = 1, and what followed.
            Predictions at padding mean nothing.
        confidence: defaults to `SoftmaxGap()`.
    """
    view, measure = view_for(model), confidence or SoftmaxGap()
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    inputs = view.read(input_ids, mask)
    prompt_length = 1 if inputs.prompt is None else inputs.prompt.shape[1]
    state = view.begin(None, **inputs.arguments)
    hidden = view.embed(state, sequences[:, :-1])  # (B, P - 1 + T, D)
    confidences, tokens = [], []
    for layer in range(1, view.num_layers + 1):
        hidden = view.run_layers(state, hidden, layer - 1, layer)
        predicting = view.read_exit(state, hidden, layer)[:, prompt_length - 1 :]  # (B, T, D)
        states = predicting.flatten(0, 1)  # (B * T, D)
        measured = measure(view, states, layer)
        logits = view.predict(states, layer) if measured.logits is None else measured.logits
        confidences.append(measured.confidence.view(predicting.shape[:2]))
        tokens.append(logits.argmax(-1).view(predicting.shape[:2]))
    return LayerTrace(torch.stack(confidences, dim=-1), torch.stack(tokens, dim=-1))
