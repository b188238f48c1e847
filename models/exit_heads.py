"""Trainable parts that early exiting adds to a model, and the exit configuration saved beside it.

`attach_exit_heads(model, exit_config)` hangs the modules on the model under the names of the original
FREE checkpoints (`cm_head`, `layer_transformation`), so that `save_pretrained` and optimizers see them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.choices import INTERMEDIATE_LOSSES
from models.choices import PER_EXIT_HEADS as PER_EXIT_HEADS
from models.errors import UserError
from models.families import view_for
from models.json_files import check_fields, read_mapping

T = TypeVar("T")
EXIT_CONFIG_NAME = "exit_config.json"
HEAD_NAMES = ("cm_head", "layer_transformation", "per_exit_heads")


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
    per_exit_head: str | None = None

    def save(self, folder: str | Path) -> None:
        Path(folder, EXIT_CONFIG_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf8")

    @classmethod
    def load(cls, folder: str | Path) -> ExitConfig:
        """Read the configuration from a save of ours, or from the `config.json` of an original FREE one."""
        for file in (Path(folder, EXIT_CONFIG_NAME), Path(folder, "config.json")):
            if file.is_file():
                return cls.from_settings(read_mapping(file), file)
        return cls()

    @classmethod
    def from_settings(cls, settings: dict[str, Any], file: Path) -> ExitConfig:
        """Check what a file says; only a `config.json` may also speak of other things.

        Raises:
            UserError: an unknown setting, one of another type, or a loss or head that there is not.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown and file.name == EXIT_CONFIG_NAME:
            raise UserError(
                f"{file}: there is no setting {', '.join(unknown)}; known are {', '.join(known)}."
            )
        given = {name: settings[name] for name in known if settings.get(name) is not None}
        check_fields(given, get_type_hints(cls), str(file))
        choices = {"per_exit_head": PER_EXIT_HEADS, "intermediate_loss_fn": INTERMEDIATE_LOSSES}
        for name, allowed in choices.items():
            if given.get(name, allowed[0]) not in allowed:
                raise UserError(f"{file}: {name} must be one of {', '.join(allowed)}, not {given[name]!r}.")
        if given.get("shallow_exit_layer", 1) < 1:
            raise UserError(f"{file}: shallow_exit_layer counts from 1, got {given['shallow_exit_layer']}.")
        return cls(**given)


class ConfidenceHead(nn.Sequential):
    """P(the shallow prediction is right), from a normalized state: (..., D) -> (..., 2) logits.

    Two linear layers without biases, as in the original's training code (CALM, section 3.5, learns a
    linear classifier; FREE, appendix A, this one).
    """

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, 2, bias=False))


class ExitProjection(nn.Module):
    """Residual linear map, at first the identity, before a layer norm: (..., D) -> (..., D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.linear(hidden))


def make_per_exit_heads(kind: str, layers: Iterable[int], width: int) -> nn.ModuleDict:
    """One head of its own for each exit, keyed by the layer's number."""
    head = {"norm": nn.LayerNorm, "projection": ExitProjection}[kind]
    return nn.ModuleDict({str(layer): head(width) for layer in layers})


def attach_exit_heads(
    model: PreTrainedModel, exit_config: ExitConfig, stored: Iterable[int] = (), *, only: bool = False
) -> None:
    """Add the heads that `exit_config` asks for and `model` lacks, freshly initialised; per-exit heads also
    after those of its layers that a checkpoint has `stored` some for, or `only` after these."""
    width = model.config.hidden_size
    read_width = model.get_output_embeddings().weight.shape[1]  # by the LM head: narrower in OPT-350m
    if exit_config.train_meta_cm_head and not hasattr(model, "cm_head"):
        model.cm_head = ConfidenceHead(read_width).to(model.device, model.dtype)
    if exit_config.do_layer_transformation and not hasattr(model, "layer_transformation"):
        model.layer_transformation = nn.Linear(read_width, read_width).to(model.device, model.dtype)
        nn.init.eye_(model.layer_transformation.weight)
        nn.init.zeros_(model.layer_transformation.bias)
    if exit_config.per_exit_head and not hasattr(model, "per_exit_heads"):
        exits, shallow = {*range(1, view_for(model).num_layers)}, exit_config.shallow_exit_layer
        asked = set() if only else {shallow} if shallow else exits
        layers = asked | (exits & {*stored})
        heads = make_per_exit_heads(exit_config.per_exit_head, sorted(layers), width)
        model.per_exit_heads = heads.to(model.device, model.dtype)


def exit_head_weights(state_dict: dict[str, T]) -> dict[str, T]:
    """The entries of a checkpoint that belong to exit heads; the original hangs some on the decoder."""
    entries = {name.removeprefix("decoder."): weight for name, weight in state_dict.items()}
    return {name: weight for name, weight in entries.items() if is_head_weight(name)}


def is_head_weight(name: str) -> bool:
    return name.removeprefix("decoder.").split(".")[0] in HEAD_NAMES


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leave only the confidence head trainable."""
    model.requires_grad_(False)
    model.cm_head.requires_grad_(True)


def head_misfits(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Weights of the attached heads that `weights` lacks or has in another shape."""
    wanted = exit_head_weights(model.state_dict())
    shared = set(wanted) & set(weights)
    return {
        "missing": sorted(set(wanted) - set(weights)),
        "wrong shape": sorted(name for name in shared if wanted[name].shape != weights[name].shape),
    }


@torch.no_grad()
def load_exit_heads(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Copy checkpoint entries into the attached heads, which they must fit."""
    for name, target in exit_head_weights(model.state_dict()).items():
        target.copy_(weights[name])
