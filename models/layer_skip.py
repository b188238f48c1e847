"""LayerSkip's recipe for training a whole model to exit (Elhoushi et al., 2024, section 4.1).

`LayerDropout(layers, 0.1)` skips layers at random, the deeper the oftener; `ExitCurriculum("rotational", L)`
says which exits have a loss at a training step. Layers count from 1 here, from 0 in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.choices import ROTATIONAL


def dropout_rates(num_layers: int, highest: float) -> list[float]:
    """Probability that a sample skips each layer: D(l) = exp(l ln 2 / (L - 1)) - 1, from 0 at the first to 1
    at the last, times `highest`."""
    last = max(num_layers - 1, 1)
    return [highest * math.expm1(layer * math.log(2) / last) for layer in range(num_layers)]


class LayerDropout:
    """Lets each sample of a training batch skip layers at random: its states go past them unchanged.

    The layers still run for all samples, so that this makes nothing faster.
    """

    def __init__(self, layers: Iterable[nn.Module], highest: float) -> None:
        layers = list(layers)
        for layer, rate in zip(layers, dropout_rates(len(layers), highest), strict=True):
            if rate > 0:  # prepended: what records the layers' outputs must see what the next one reads
                layer.register_forward_hook(self._skip_at(rate), prepend=True, with_kwargs=True)

    def _skip_at(self, rate: float) -> Any:
        def skip(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not layer.training:
                return output
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]  # (B, T, D)
            skipped = torch.rand(hidden.shape[0], 1, 1, device=hidden.device) < rate
            if not isinstance(output, tuple):
                return torch.where(skipped, hidden, output)
            return (torch.where(skipped, hidden, output[0]), *output[1:])

        return skip


def sum_l_weights(num_layers: int, e_scale: float) -> dict[int, float]:
    """Weight of each layer's cross-entropy, quadratic in depth (section 4.1.2, e(l)), not yet normalized:
    e_scale * (0 + 1 + ... + l), and L - 1 + e_scale * (0 + 1 + ... + (L - 2)) at the last."""
    weights = {layer: e_scale * layer * (layer - 1) / 2 for layer in range(1, num_layers)}
    return weights | {num_layers: num_layers - 1 + e_scale * (num_layers - 1) * (num_layers - 2) / 2}


@dataclass(frozen=True)
class ExitCurriculum:
    """Which exits have a loss at a step (section 4.1.2, C(t, l)); the last layer always has.

    `rotational`: every R-th layer, all in turn; `gradual`: from the last one down, one more every T / 2L
    steps.
    """

    kind: str  # of models.choices.EXIT_CURRICULA
    num_layers: int
    interval: int = 8  # R

    def enabled(self, step: int, steps: int) -> set[int]:
        """Layers with a loss at step `step`, from 0, of `steps`."""
        layers, count = range(1, self.num_layers + 1), self.num_layers
        if self.kind == ROTATIONAL:
            chosen = {layer for layer in layers if (layer - 1) % self.interval == step % self.interval}
        else:
            chosen = {layer for layer in layers if layer >= count - 2 * count * step // steps}
        return chosen | {count}
