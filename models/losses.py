"""Training losses of early exiting: cross-entropy at exits, layer-wise distillation, confidence head.

`build_exit_loss(...)` turns the public flags into one object; calling it on a forward pass gives the total
to minimise and its parts to log. Layers count from 1; N is the number of target tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.choices import INTERMEDIATE_LOSSES as INTERMEDIATE_LOSSES
from models.decoder_view import DecoderView

PADDING_LABEL = -100
TOKENS_PER_CHUNK = 2048


@dataclass
class LossTerms:
    """`total` is minimised; `parts` holds detached scalars for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def without_logits(model: nn.Module) -> Iterator[None]:
    """A forward pass whose LM head sees no position: logits are (B, 0, V).

    Losses project the states of their exits themselves, the last layer's too, in chunks.
    """

    def hide_states(head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        handle.remove()  # a loss may use the head before the pass has ended
        return (inputs[0][:, :0],)

    handle = model.get_output_embeddings().register_forward_pre_hook(hide_states)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class TargetTokens:
    """The target positions of a batch that count, and how to read states there."""

    keep: Tensor  # (B, T) bool
    labels: Tensor  # (N,)

    @classmethod
    def of(cls, labels: Tensor) -> TargetTokens:
        keep = labels != PADDING_LABEL
        return cls(keep, labels[keep])

    def select(self, states: Tensor) -> Tensor:
        """(B, T, D) -> (N, D)."""
        return states[self.keep]


def normalized_state(view: DecoderView, states: tuple[Tensor, ...], layer: int) -> Tensor:
    """Output of `layer` after the final norm; the decoder has already normalized its last: (B, T, D)."""
    return states[layer] if layer == view.num_layers else view.normalize(states[layer], layer)


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def chunked_cross_entropy(
    view: DecoderView, normalized: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of (N, D) states; logits exist for one chunk at a time, in backward as well."""

    def chunk_sum(states: Tensor, targets: Tensor) -> Tensor:
        logits = full_precision(view.project(states))
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)

    chunks = zip(normalized.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True)
    return sum(checkpoint(chunk_sum, *chunk, use_reentrant=False) for chunk in chunks) / labels.numel()


@dataclass
class ExitCrossEntropy:
    """Weighted sum of the cross-entropies at several exits (FREE, eq. 1; CALM, eq. 6)."""

    layer_weights: dict[int, float]
    label_smoothing: float = 0.0

    def __call__(self, view: DecoderView, outputs: Any, tokens: TargetTokens) -> LossTerms:
        states = view.training_states(outputs)
        weights = self.layer_weights
        losses = {layer: self._at(layer, view, states, tokens) for layer in weights}
        total = sum(weight * losses[layer] for layer, weight in weights.items())
        return LossTerms(total, {f"ce_layer_{layer}": loss.detach() for layer, loss in losses.items()})

    def _at(self, layer: int, view: DecoderView, states: tuple[Tensor, ...], tokens: TargetTokens) -> Tensor:
        selected = tokens.select(normalized_state(view, states, layer))
        return chunked_cross_entropy(view, selected, tokens.labels, self.label_smoothing)


def exit_layer_weights(
    name: str, num_layers: int, shallow_layer: int | None, shallow_weight: float | None = None
) -> dict[int, float]:
    """Weight of each exit's cross-entropy under an `--intermediate_loss_fn`; they sum to 1.

    `ce` weighs all layers alike, `weighted_ce` layer i by i (CALM, eq. 6), every `shallowdeep_*` layers S
    and L by S and L (FREE, eq. 1), or by `shallow_weight` and the rest.
    """
    if name == "ce":
        raw = dict.fromkeys(range(1, num_layers + 1), 1)
    elif name == "weighted_ce":
        raw = {layer: layer for layer in range(1, num_layers + 1)}
    elif shallow_weight is None:
        raw = {layer: layer for layer in (shallow_layer, num_layers)}
    else:
        raw = {shallow_layer: shallow_weight, num_layers: 1 - shallow_weight}
    return {layer: weight / sum(raw.values()) for layer, weight in raw.items()}


def uniform_teachers(num_layers: int, shallow_layer: int) -> list[int]:
    """Teacher layer of each shallow layer, evenly spread and ending at the last (24, 6: 4, 8, ..., 24)."""
    return [i * num_layers // shallow_layer for i in range(1, shallow_layer + 1)]


def align_last(distances: Tensor) -> list[int]:
    """Student of each teacher row, or -1 for none: only the last teacher teaches, the last student."""
    return [-1] * (len(distances) - 1) + [distances.shape[1] - 1]


def align_uniform(distances: Tensor) -> list[int]:
    """Teacher i teaches student i."""
    return list(range(len(distances)))


def align_closest(distances: Tensor) -> list[int]:
    """Each teacher, from the top, teaches its closest student below the one aligned before (FREE, eq. 3).

    Where no student is left below, the lowest aligned one is taught again.
    """
    alignment, ceiling = [], distances.shape[1]
    for row in reversed(distances.tolist()):
        candidates = row[:ceiling] or [row[0]]
        ceiling = min(range(len(candidates)), key=candidates.__getitem__)
        alignment.append(ceiling)
    return alignment[::-1]


@dataclass
class LayerwiseDistillation:
    """MSE between normalized states of teacher layers (detached) and shallow layers (FREE, section 4.2).

    `align` maps the (teachers, students) distance matrix to one student index a teacher. With
    `mask_padding=False` padded positions count, as in the original implementation.
    """

    num_layers: int
    shallow_layer: int
    align: Callable[[Tensor], list[int]]
    layer_transformation: torch.nn.Module | None = None
    mask_padding: bool = True

    def __call__(self, view: DecoderView, outputs: Any, tokens: TargetTokens) -> LossTerms:
        states = view.training_states(outputs)
        teachers = [
            self._read(view, states, layer, tokens).detach()
            for layer in uniform_teachers(self.num_layers, self.shallow_layer)
        ]
        students = [
            self._transform(self._read(view, states, layer, tokens))
            for layer in range(1, self.shallow_layer + 1)
        ]
        pairs = self._pair(teachers, students)
        loss = torch.stack([F.mse_loss(student, teacher) for teacher, student in pairs]).mean()
        return LossTerms(loss, {"distillation": loss.detach()})

    def _read(
        self, view: DecoderView, states: tuple[Tensor, ...], layer: int, tokens: TargetTokens
    ) -> Tensor:
        normalized = normalized_state(view, states, layer)
        return tokens.select(normalized) if self.mask_padding else normalized

    def _transform(self, student: Tensor) -> Tensor:
        return student if self.layer_transformation is None else self.layer_transformation(student)

    def _pair(self, teachers: list[Tensor], students: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            distances = torch.stack(
                [torch.stack([F.mse_loss(student, teacher) for student in students]) for teacher in teachers]
            )
        alignment = self.align(distances)
        return [(teachers[i], students[j]) for i, j in enumerate(alignment) if j >= 0]


@dataclass
class ExitLoss:
    """Cross-entropy at the exits plus `alpha` times distillation."""

    cross_entropy: ExitCrossEntropy
    distillation: LayerwiseDistillation | None = None
    alpha: float = 0.0

    def __call__(self, view: DecoderView, outputs: Any, labels: Tensor) -> LossTerms:
        tokens = TargetTokens.of(labels)
        terms = self.cross_entropy(view, outputs, tokens)
        if self.distillation is None:
            return terms
        distilled = self.distillation(view, outputs, tokens)
        return LossTerms(terms.total + self.alpha * distilled.total, {**terms.parts, **distilled.parts})


@dataclass
class ConfidenceHeadLoss:
    """Teach the confidence head whether an exit's prediction agrees with the last layer's.

    Classes are balanced within each layer: the mean of the two class means, over the classes present. The
    layers are weighted by depth (CALM, eq. 6). The backbone receives no gradient.
    """

    layers: list[int]

    def __call__(self, view: DecoderView, outputs: Any, labels: Tensor) -> LossTerms:
        states, tokens = view.training_states(outputs), TargetTokens.of(labels)
        deep_tokens = predict_tokens(view, tokens.select(normalized_state(view, states, view.num_layers)))
        losses = {layer: self._at(layer, view, states, tokens, deep_tokens) for layer in self.layers}
        total = sum(layer * loss for layer, loss in losses.items()) / sum(losses)
        return LossTerms(total, {f"cm_layer_{layer}": loss.detach() for layer, loss in losses.items()})

    def _at(
        self,
        layer: int,
        view: DecoderView,
        states: tuple[Tensor, ...],
        tokens: TargetTokens,
        deep_tokens: Tensor,
    ) -> Tensor:
        selected = tokens.select(normalized_state(view, states, layer)).detach()
        agrees = (predict_tokens(view, selected) == deep_tokens).long()
        logits = full_precision(view.model.cm_head(selected))
        return balanced_cross_entropy(logits, agrees)


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes present of each class's mean cross-entropy: (N, 2), (N,) -> scalar."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    class_means = [losses[labels == label].mean() for label in labels.unique()]
    return torch.stack(class_means).mean()


@torch.no_grad()
def predict_tokens(view: DecoderView, normalized: Tensor) -> Tensor:
    """Greedy tokens of (N, D) states, one chunk of logits at a time: (N,)."""
    return torch.cat([view.project(chunk).argmax(-1) for chunk in normalized.split(TOKENS_PER_CHUNK)])


def build_exit_loss(
    view: DecoderView,
    name: str,
    shallow_layer: int | None = None,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    mask_padding: bool = True,
    shallow_weight: float | None = None,
) -> ExitLoss:
    """The loss object of an `--intermediate_loss_fn` (one of `INTERMEDIATE_LOSSES`)."""
    weights = exit_layer_weights(name, view.num_layers, shallow_layer, shallow_weight)
    cross_entropy = ExitCrossEntropy(weights, label_smoothing)
    aligners = {"last": align_last, "unif": align_uniform, "dyna": align_closest}
    align = aligners.get(name.removeprefix("shallowdeep_kd_"))
    if align is None:
        return ExitLoss(cross_entropy)
    transformation = getattr(view.model, "layer_transformation", None)
    distillation = LayerwiseDistillation(view.num_layers, shallow_layer, align, transformation, mask_padding)
    return ExitLoss(cross_entropy, distillation, alpha)


def build_confidence_head_loss(view: DecoderView, shallow_layer: int | None) -> ConfidenceHeadLoss:
    """For FREE the one exit is taught, for CALM every layer below the last."""
    layers = [shallow_layer] if shallow_layer else list(range(1, view.num_layers))
    return ConfidenceHeadLoss(layers)
