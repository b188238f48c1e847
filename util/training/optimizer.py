"""Muon for the hidden weight matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al., 2024; `torch.optim.Muon`) needs far fewer steps than AdamW to train a small model from
scratch: see --use_muon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps both optimizers; learning-rate schedules see the groups of both."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], **settings: Any) -> None:
        lr, weight_decay, betas = settings["lr"], settings["weight_decay"], settings["betas"]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=0.0),
        ]
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the trainer gives none
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # loading replaces the groups of the parts


def build_muon(model: nn.Module, training: TrainingArguments) -> MuonWithAdamW:
    """Muon for 2-D weights inside the layers; embeddings, heads and norms go to AdamW."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and id(parameter) not in embeddings and "lm_head" not in name
            (matrices if hidden else others).append(parameter)
    return MuonWithAdamW(
        matrices,
        others,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        betas=(training.adam_beta1, training.adam_beta2),
    )
