"""Where a model runs."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from models.loading import cast_model


def best_device() -> torch.device:
    """The accelerator, if there is one that works, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def move_model(
    model: PreTrainedModel, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Put a model on a device (default: the best one), in this precision, ready to decode."""
    cast_model(model.to(device or best_device()), dtype).eval()
