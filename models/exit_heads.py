"""Trainable parts that early exiting adds to a model, and the exit configuration saved beside it.

`attach_exit_heads(model, exit_config)` hangs the modules on the model under the names of the original
FREE checkpoints (`cm_head`, `layer_transformation`), so that `save_pretrained` and optimizers see them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.errors import UserError

EXIT_CONFIG_NAME = "exit_config.json"
HEAD_NAMES = ("cm_head", "layer_transformation")


@dataclass
class ExitConfig:
    """How a checkpoint was trained to exit; the default of an evaluation that loads it.

    Layers count from 1. None stands for "not trained for it".
    """

    intermediate_loss_fn: str | None = None
    shallow_exit_layer: int | None = None
    distill_layer_alpha: float | None = None
    do_layer_transformation: bool = False
    train_meta_cm_head: bool = False

    def save(self, folder: str | Path) -> None:
        Path(folder, EXIT_CONFIG_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf8")

    @classmethod
    def load(cls, folder: str | Path) -> ExitConfig:
        """Read the configuration from a save of ours, or from the `config.json` of an original FREE one."""
        names = {field.name for field in fields(cls)}
        for file in (Path(folder, EXIT_CONFIG_NAME), Path(folder, "config.json")):
            if file.is_file():
                try:
                    settings = json.loads(file.read_text(encoding="utf8"))
                except ValueError as error:
                    raise UserError(f"{file} is not JSON: {error}") from error
                return cls(**{name: settings[name] for name in names if settings.get(name) is not None})
        return cls()


class ConfidenceHead(nn.Sequential):
    """P(the shallow prediction is right), from a normalized state: (..., D) -> (..., 2) logits.

    Two linear layers without biases, as in the original's training code (CALM, section 3.5, learns a
    linear classifier; FREE, appendix A, this one).
    """

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 2, bias=False))


def attach_exit_heads(model: PreTrainedModel, exit_config: ExitConfig) -> None:
    """Add the heads that `exit_config` asks for and `model` lacks, freshly initialised."""
    width = model.config.d_model
    if exit_config.train_meta_cm_head and not hasattr(model, "cm_head"):
        model.cm_head = ConfidenceHead(width).to(model.device, model.dtype)
    if exit_config.do_layer_transformation and not hasattr(model, "layer_transformation"):
        model.layer_transformation = nn.Linear(width, width).to(model.device, model.dtype)
        nn.init.eye_(model.layer_transformation.weight)
        nn.init.zeros_(model.layer_transformation.bias)


def exit_head_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a checkpoint that belong to exit heads."""
    return {name: weight for name, weight in state_dict.items() if name.split(".")[0] in HEAD_NAMES}


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leave only the confidence head trainable."""
    model.requires_grad_(False)
    model.cm_head.requires_grad_(True)


@torch.no_grad()
def load_exit_heads(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Copy checkpoint entries into the attached heads.

    Raises:
        UserError: an attached head is missing from `weights`, or a shape differs.
    """
    wanted = exit_head_weights(model.state_dict())
    missing = sorted(set(wanted) - set(weights))
    misfits = sorted(name for name in set(wanted) & set(weights) if wanted[name].shape != weights[name].shape)
    if missing or misfits:
        raise UserError(f"Exit heads do not fit the checkpoint: missing {missing}, wrong shape {misfits}.")
    for name, target in wanted.items():
        target.copy_(weights[name])
