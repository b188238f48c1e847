"""What an exit is taught by: the last layer's distribution p, its own q, over the K tokens of a shortlist and
one more for all others, or over all V tokens.

    loss = distillation_loss(logits, teacher)  # (N, K + 1), Teacher -> (N,)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.families.causal import CausalView
from models.families.drafts import read_drafts
from models.families.encoder_decoder import EncoderDecoderView
from util.exit_training.states import Batch

LayeredView = CausalView | EncoderDecoderView
SMALLEST = 1e-6  # of a probability whose logarithm is taken


class Teacher(NamedTuple):
    """Probabilities p."""

    listed: Tensor  # (N, K) of the tokens that the exit may say
    others: Tensor | None  # (N, 1) of all others; None: there are none


def teacher_of(view: LayeredView, batch: Batch) -> Teacher:
    """The frozen model's probabilities of the N predicted tokens of a batch."""
    assert view.exit_adapter is not None
    if view.exit_adapter.shortlist is None:
        return Teacher((view.project(batch.final) - batch.log_sum[:, None]).exp(), None)
    listed = (view.project_listed(batch.final) - batch.log_sum[:, None]).exp()
    return Teacher(listed, (1 - listed.sum(-1, keepdim=True)).clamp(min=0))


def exit_logits(view: LayeredView, batch: Batch) -> Tensor:
    """What the exit says to the N predicted tokens, with gradients of its adapter: (N, K + 1) or (N, V)."""
    return view.exit_logits(exit_states(view, batch)[batch.predicting])


def exit_states(view: LayeredView, batch: Batch) -> Tensor:
    """What the exit reads of all tokens of a batch: (B, T, D)."""
    adapter, last = view.exit_adapter, view.num_layers
    assert adapter is not None
    hidden = batch.hidden[adapter.layer]
    if adapter.block is None:
        return hidden
    state: Any = view.begin(None, **batch.arguments)
    if adapter.kv_layer is None:
        inputs = view.step_inputs(state, last, hidden.shape[1], True)
        return view.apply_layers(hidden, inputs, None, last, last + 1)
    with torch.no_grad():
        view.write_kv(state, batch.hidden[adapter.origin], adapter.origin, adapter.kv_layer)
    return read_drafts(view, state, hidden, batch.run_starts)


def distillation_loss(logits: Tensor, teacher: Teacher) -> Tensor:
    """KL(p || q) of each token."""
    p = teacher.listed if teacher.others is None else torch.cat([teacher.listed, teacher.others], dim=-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return -(p * logits.log_softmax(-1)).sum(-1) - entropy


def acceptance_loss(logits: Tensor, teacher: Teacher) -> Tensor:
    """-log sum min(p, q) of each token: of the probability that speculative sampling accepts a draft
    (Leviathan et al., 2023, corollary 3.6)."""
    return -acceptance(logits, teacher).clamp(min=SMALLEST).log()


def acceptance(logits: Tensor, teacher: Teacher) -> Tensor:
    """Probability that a drafted token is accepted when both sample: (N,)."""
    q = logits.softmax(-1)[:, : teacher.listed.shape[-1]]
    return torch.minimum(teacher.listed, q).sum(-1)


LOSSES = {"kl": distillation_loss, "acceptance": acceptance_loss}
