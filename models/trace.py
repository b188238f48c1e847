"""What each layer would have predicted for tokens that are already there: one parallel pass, for analysis.

    trace = trace_layers(model, inputs.input_ids, inputs.attention_mask, model.generate(**inputs))

FREE's synchronized parallel decoding sees exactly these shallow states; under CALM's state copying and
Static-Exiting they are what exact keys/values would give. An exit adapter with a `kv_layer` is shown as it
speaks to tokens none of which waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.confidence import ConfidenceMeasure, SoftmaxGap, measure_states
from models.decoder_view import DecoderView
from models.families import view_for
from models.families.drafts import read_drafts
from models.families.stack import StackView


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
    said, late = {}, deep_reading_layer(view)
    for layer in range(1, view.num_layers + 1):
        hidden = view.run_layers(state, hidden, layer - 1, layer)
        if layer == late:
            shallow = hidden
        else:
            said[layer] = ask(view, view.read_exit(state, hidden, layer), layer, prompt_length, measure)
    if late is not None:
        alone = torch.arange(hidden.shape[1], device=hidden.device)[None]
        said[late] = ask(
            view, read_drafts(cast(StackView, view), state, shallow, alone), late, prompt_length, measure
        )
    confidences, tokens = zip(*(said[layer] for layer in sorted(said)), strict=True)
    return LayerTrace(torch.stack(confidences, dim=-1), torch.stack(tokens, dim=-1))


def deep_reading_layer(view: DecoderView) -> int | None:
    """After which tokens exit by an adapter that reads what deeper layers make; None: there is none."""
    adapter = view.exit_adapter
    return adapter.layer if adapter is not None and adapter.kv_layer is not None else None


def ask(
    view: DecoderView, hidden: Tensor, layer: int, prompt_length: int, measure: ConfidenceMeasure
) -> tuple[Tensor, Tensor]:
    """Confidence in, and most probable, next tokens of (B, P - 1 + T, D) states of a layer: (B, T) both."""
    predicting = hidden[:, prompt_length - 1 :]  # (B, T, D)
    states = predicting.flatten(0, 1)  # (B * T, D)
    measured = measure_states(measure, view, states, layer)
    logits = view.predict(states, layer) if measured.logits is None else measured.logits
    shape = predicting.shape[:2]
    return measured.confidence.view(shape), logits.argmax(-1).view(shape)
