"""Training losses of early exiting: cross-entropy at exits, layer-wise distillation, confidence head.

`build_exit_loss(...)` turns the public flags into one object; calling it on a forward pass gives the total
to minimise and its parts to log. Layers count from 1; N is the number of target tokens that are not padding.

A micro-batch is one share of the batch that an optimizer step sees. Losses return their share of the whole
batch's loss, so that the sum over micro-batches and processes is the loss of one big batch; what they must
know of the whole, `total` tells them.
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
from transformers import PreTrainedModel

from models.choices import INTERMEDIATE_LOSSES as INTERMEDIATE_LOSSES
from models.decoder_view import PADDING_LABEL, DecoderView
from models.errors import UserError
from models.layer_skip import ExitCurriculum, sum_l_weights

TOKENS_PER_CHUNK = 2048


Total = Callable[[str, Tensor], Tensor]
"""Sum over the whole batch of what a micro-batch counted under a name: `total(name, own)`."""


def own_total(name: str, own: Tensor) -> Tensor:
    """The micro-batch is the whole batch."""
    return own


@dataclass
class LossTerms:
    """`total` is minimised; `parts` holds detached scalars for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def times(self, share: Tensor) -> LossTerms:
        return LossTerms(share * self.total, {name: share * value for name, value in self.parts.items()})


def token_share(labels: Tensor, total: Total = own_total) -> Tensor:
    """The share that (B, T) labels, as `view.training_labels` places them, have in the whole batch's target
    tokens."""
    own = (labels != PADDING_LABEL).sum()
    return own / total("tokens", own).clamp(min=1)


@contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
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
    """Mean cross-entropy of (N, D) states, 0 if N is; logits exist for one chunk at a time, in backward as
    well."""

    def chunk_sum(states: Tensor, targets: Tensor) -> Tensor:
        logits = full_precision(view.project(states))
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)

    chunks = zip(normalized.split(TOKENS_PER_CHUNK), labels.split(TOKENS_PER_CHUNK), strict=True)
    return sum(checkpoint(chunk_sum, *chunk, use_reentrant=False) for chunk in chunks) / max(len(labels), 1)


@dataclass
class ExitCrossEntropy:
    """Weighted sum of the cross-entropies at several exits (FREE, eq. 1; CALM, eq. 6)."""

    layer_weights: dict[int, float]
    label_smoothing: float = 0.0
    curriculum: ExitCurriculum | None = None
    progress: tuple[int, int] = (0, 1)  # the training step, from 0, and how many there are

    def weights(self) -> dict[int, float]:
        """Those of the exits that have a loss at this step; they sum to 1."""
        if self.curriculum is None:
            return self.layer_weights
        enabled = self.curriculum.enabled(*self.progress)
        return normalize({layer: weight for layer, weight in self.layer_weights.items() if layer in enabled})

    def __call__(self, view: DecoderView, outputs: Any, tokens: TargetTokens) -> LossTerms:
        states = view.training_states(outputs)
        weights = self.weights()
        losses = {layer: self._at(layer, view, states, tokens) for layer in weights}
        total = torch.stack([weight * losses[layer] for layer, weight in weights.items()]).sum()
        return LossTerms(total, {f"ce_layer_{layer}": loss.detach() for layer, loss in losses.items()})

    def _at(self, layer: int, view: DecoderView, states: tuple[Tensor, ...], tokens: TargetTokens) -> Tensor:
        selected = tokens.select(normalized_state(view, states, layer))
        return chunked_cross_entropy(view, selected, tokens.labels, self.label_smoothing)


def exit_layer_weights(
    name: str,
    num_layers: int,
    shallow_layer: int | None,
    shallow_weight: float | None = None,
    e_scale: float = 1.0,
) -> dict[int, float]:
    """Weight of each exit's cross-entropy under an `--intermediate_loss_fn`; they sum to 1.

    `ce` weighs all layers alike, `weighted_ce` layer i by i (CALM, eq. 6), `sum_l` by a sum up to its depth,
    times `e_scale` (LayerSkip, section 4.1.2), every `shallowdeep_*` layers S and L by S and L (FREE, eq. 1),
    or by `shallow_weight` and the rest.
    """
    raw: dict[int, float]
    if name == "ce":
        raw = dict.fromkeys(range(1, num_layers + 1), 1)
    elif name == "weighted_ce":
        raw = {layer: layer for layer in range(1, num_layers + 1)}
    elif name == "sum_l":
        raw = sum_l_weights(num_layers, e_scale)
    elif shallow_weight is None:
        raw = {layer: layer for layer in (require_layer(name, shallow_layer), num_layers)}
    else:
        raw = {require_layer(name, shallow_layer): shallow_weight, num_layers: 1 - shallow_weight}
    return normalize({layer: weight for layer, weight in raw.items() if weight > 0})


def normalize(weights: dict[int, float]) -> dict[int, float]:
    """The weights, divided by their sum."""
    return {layer: weight / sum(weights.values()) for layer, weight in weights.items()}


def require_layer(name: str, shallow_layer: int | None) -> int:
    """The exit that a loss needs; UserError if there is none."""
    if shallow_layer is None:
        raise UserError(f"{name} needs a shallow_layer.")
    return shallow_layer


def uniform_teachers(num_layers: int, shallow_layer: int) -> list[int]:
    """Teacher layer of each shallow layer, evenly spread and ending at the last (24, 6: 4, 8, ..., 24)."""
    return [i * num_layers // shallow_layer for i in range(1, shallow_layer + 1)]


def fixed_alignment(name: str, shallow_layer: int) -> list[int] | None:
    """Student index of each of the S teachers, -1 for none (FREE, section 4.2).

    `last`: only the last teacher teaches, the last student; `unif`: each teacher the student of its rank;
    `dyna`: None, as states decide, batch by batch.
    """
    if name == "last":
        return [-1] * (shallow_layer - 1) + [shallow_layer - 1]
    return list(range(shallow_layer)) if name == "unif" else None


def align_closest(distances: Tensor) -> list[int]:
    """Each teacher, from the top, teaches its closest student below the one aligned before (FREE, eq. 3):
    distances (teachers, students) -> student index of each teacher. Of equally close ones, the lower."""
    alignment, ceiling = [], distances.shape[1]
    for row in reversed(distances.tolist()):
        # Step 1. Candidates lie below the student of the teacher above; where none does, the lowest is taught
        # again.
        candidates = row[:ceiling] or [row[0]]
        # Step 2. The closest of them is taught, and bounds the teachers to come.
        ceiling = min(range(len(candidates)), key=candidates.__getitem__)
        alignment.append(ceiling)
    return alignment[::-1]


@dataclass
class LayerwiseDistillation:
    """MSE between normalized states of teacher layers (detached) and shallow layers (FREE, section 4.2).

    `alignment` holds one student index a teacher, -1 for none; None takes the closest (`align_closest`). With
    `mask_padding=False` padded positions count, as in the original implementation.
    """

    num_layers: int
    shallow_layer: int
    alignment: list[int] | None
    layer_transformation: torch.nn.Module | None = None
    mask_padding: bool = True

    def __call__(
        self, view: DecoderView, outputs: Any, tokens: TargetTokens, total: Total = own_total
    ) -> LossTerms:
        # Step 1. Read S teachers, spread evenly over all layers and ending at the last, and S students.
        teachers, students = self._read_all(view, outputs, tokens)
        # Step 2. Say who teaches whom: fixed (`last`, `unif`), or by distances over the whole batch (`dyna`).
        alignment = self.alignment
        if alignment is None:
            alignment = align_closest(total("distances", sum_distances(teachers, students)))
        # Step 3. Mean over the pairs of their mean squared differences.
        pairs = [(teachers[i], students[j]) for i, j in enumerate(alignment) if j >= 0]
        loss = torch.stack([squared_error(student, teacher) for teacher, student in pairs]).mean()
        return LossTerms(loss, {"distillation": loss.detach()})

    def _read_all(
        self, view: DecoderView, outputs: Any, tokens: TargetTokens
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of the teachers and of the students, each (N, D)."""
        states = view.training_states(outputs)
        teachers = uniform_teachers(self.num_layers, self.shallow_layer)
        students = range(1, self.shallow_layer + 1)
        return (
            [self._read(view, states, layer, tokens).detach() for layer in teachers],
            [self._transform(self._read(view, states, layer, tokens)) for layer in students],
        )

    def _read(
        self, view: DecoderView, states: tuple[Tensor, ...], layer: int, tokens: TargetTokens
    ) -> Tensor:
        normalized = normalized_state(view, states, layer)
        return tokens.select(normalized) if self.mask_padding else normalized.flatten(0, 1)

    def _transform(self, student: Tensor) -> Tensor:
        return student if self.layer_transformation is None else self.layer_transformation(student)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over (N, D) states; 0 if N is, as in a share of the batch that has no target token."""
    return F.mse_loss(student, teacher) if len(student) else student.sum()


@torch.no_grad()
def sum_distances(teachers: list[Tensor], students: list[Tensor]) -> Tensor:
    """Mean squared difference of each teacher and student, summed over positions: (teachers, students)."""
    rows = [torch.stack([squared_error(student, teacher) for student in students]) for teacher in teachers]
    return torch.stack(rows).float() * len(teachers[0])


@dataclass
class ExitLoss:
    """Cross-entropy at the exits plus `alpha` times distillation."""

    cross_entropy: ExitCrossEntropy
    distillation: LayerwiseDistillation | None = None
    alpha: float = 0.0

    def start_step(self, step: int, steps: int) -> None:
        """Say which of how many training steps comes, from 0, which a curriculum asks for."""
        self.cross_entropy.progress = (step, steps)

    @property
    def looks_around(self) -> bool:
        """Whether a micro-batch needs to know the states of the others."""
        return self.distillation is not None and self.distillation.alignment is None

    def __call__(
        self, view: DecoderView, outputs: Any, labels: Tensor, total: Total = own_total
    ) -> LossTerms:
        labels = view.training_labels(labels)
        tokens, share = TargetTokens.of(labels), token_share(labels, total)
        terms = self.cross_entropy(view, outputs, tokens)
        if self.distillation is None:
            return terms.times(share)
        distilled = self.distillation(view, outputs, tokens, total)
        both = terms.total + self.alpha * distilled.total
        return LossTerms(both, {**terms.parts, **distilled.parts}).times(share)


@dataclass
class ConfidenceHeadLoss:
    """Teach the confidence head whether an exit's prediction agrees with the last layer's.

    Classes are balanced within each layer: the mean of the two class means, over the classes present in the
    whole batch. The layers are weighted by depth (CALM, eq. 6). The backbone receives no gradient.
    """

    layers: list[int]
    looks_around = True  # states decide how many of each class there are

    def __call__(
        self, view: DecoderView, outputs: Any, labels: Tensor, total: Total = own_total
    ) -> LossTerms:
        states, agreements = self._read(view, outputs, labels)
        counts = total("classes", count_classes(agreements))
        losses = {}
        for index, layer in enumerate(self.layers):
            logits = full_precision(view.model.cm_head(states[index]))
            losses[layer] = balanced_cross_entropy(logits, agreements[index], counts[index])
        weighted = torch.stack([layer * loss for layer, loss in losses.items()]).sum() / sum(self.layers)
        return LossTerms(weighted, {f"cm_layer_{layer}": loss.detach() for layer, loss in losses.items()})

    def _read(self, view: DecoderView, outputs: Any, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each layer its states (N, D), and whether it predicts what the last layer does (N,)."""
        states, tokens = view.training_states(outputs), TargetTokens.of(view.training_labels(labels))
        deep_tokens = predict_tokens(view, tokens.select(normalized_state(view, states, view.num_layers)))
        read = [tokens.select(normalized_state(view, states, layer)).detach() for layer in self.layers]
        return read, [(predict_tokens(view, selected) == deep_tokens).long() for selected in read]


def count_classes(agreements: list[Tensor]) -> Tensor:
    """How often each layer disagrees and agrees: (layers, 2)."""
    return torch.stack([torch.bincount(agrees, minlength=2) for agrees in agreements])


def balanced_cross_entropy(logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean over the classes present of each class's mean cross-entropy: (N, 2), (N,) -> scalar.

    `counts` (2,) are those of the batch that these N are a share of.
    """
    counts = torch.bincount(labels, minlength=2) if counts is None else counts
    weights = torch.where(counts > 0, 1 / counts, 0) / (counts > 0).sum()
    return F.cross_entropy(logits, labels, weight=weights.to(logits.dtype), reduction="sum")


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
    e_scale: float = 1.0,
    curriculum: ExitCurriculum | None = None,
) -> ExitLoss:
    """The loss object of an `--intermediate_loss_fn` (one of `INTERMEDIATE_LOSSES`).

    Raises:
        UserError: it needs a `shallow_layer`, and there is none.
    """
    weights = exit_layer_weights(name, view.num_layers, shallow_layer, shallow_weight, e_scale)
    cross_entropy = ExitCrossEntropy(weights, label_smoothing, curriculum)
    if not name.startswith("shallowdeep_kd_"):
        return ExitLoss(cross_entropy)
    students = require_layer(name, shallow_layer)
    alignment = fixed_alignment(name.removeprefix("shallowdeep_kd_"), students)
    transformation = getattr(view.model, "layer_transformation", None)
    distillation = LayerwiseDistillation(view.num_layers, students, alignment, transformation, mask_padding)
    return ExitLoss(cross_entropy, distillation, alpha)


def build_confidence_head_loss(view: DecoderView, shallow_layer: int | None) -> ConfidenceHeadLoss:
    """For FREE the one exit is taught, for CALM every layer below the last."""
    layers = [shallow_layer] if shallow_layer else list(range(1, view.num_layers))
    return ConfidenceHeadLoss(layers)
