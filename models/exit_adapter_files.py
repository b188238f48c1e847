"""Exit adapters on disk: a folder with weights and what they are for, beside or without the base model.

save_exit_adapter(model, folder)
load_exit_adapter(model, folder)  # refused on any other base model
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from models.checkpoint_files import find_file, read_weights, split_gguf
from models.errors import UserError
from models.exit_adapter import (
    NAME,
    ExitAdapter,
    attach_exit_adapter,
    check_shortlist,
    exit_adapter_of,
    make_exit_adapter,
)
from models.families import view_for
from models.json_files import check_keys, read_mapping

CONFIG_NAME = f"{NAME}_config.json"
WEIGHTS_NAME = f"{NAME}.safetensors"


@dataclass
class ExitAdapterConfig:
    """What an exit adapter is, and of which model."""

    kind: str  # of models.choices.EXIT_ADAPTERS
    layer: int  # after which tokens exit, from 1
    shortlist_size: int | None  # tokens that the exit chooses from; None: all
    kv_layer: int | None  # whose keys/values it attends to, from 1; None: its own alone
    base_model: str  # as it was loaded
    base_fingerprint: str  # of its weights

    @classmethod
    def load(cls, path: Path) -> ExitAdapterConfig:
        """Raise UserError for a file that does not say all this, and only this."""
        content = read_mapping(path)
        check_keys(content, get_type_hints(cls), str(path))
        return cls(**content)


def save_exit_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
) -> None:
    """Write the exit adapter of `model`, in `dtype` if it should be another than the model's.

    `base_model`: as `load_model` took it (default: what Hugging Face calls it, of a `.gguf` file its folder).
    """
    adapter = exit_adapter_of(model)
    assert adapter is not None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = None if adapter.shortlist is None else len(adapter.shortlist)
    base = fingerprint_base(model)
    name = base_model or model.name_or_path
    config = ExitAdapterConfig(adapter.kind, adapter.layer, size, adapter.kv_layer, name, base)
    weights = {name: as_stored(weight, dtype) for name, weight in adapter.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf8")


def as_stored(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    weight = weight.detach().cpu().contiguous()
    return weight if dtype is None or not weight.is_floating_point() else weight.to(dtype)


def load_exit_adapter(model: PreTrainedModel, name_or_path: str, **hub: Any) -> ExitAdapter:
    """Attach the exit adapter of a folder or hub repository to its base model.

    Raises:
        UserError: there is none, it is damaged, or it was taught on another model.
    """
    config = read_exit_config(name_or_path, **hub)
    weights_path = find_file(name_or_path, WEIGHTS_NAME, **hub)
    if weights_path is None:
        raise UserError(f"exit_adapter: {name_or_path} has no {WEIGHTS_NAME}.")
    weights = read_weights(weights_path)
    if config.base_fingerprint != fingerprint_base(model):
        half = "load the model in float32 or bfloat16 (float16 rounds otherwise), or "
        raise UserError(
            f"exit_adapter {name_or_path} was taught on {config.base_model}, whose weights are others than "
            f"those of {model.name_or_path}: {half if model.dtype == torch.float16 else ''}load it with that "
            f"model, or teach one for this."
        )
    view: Any = view_for(model)
    size, most = config.shortlist_size, view.vocabulary
    try:
        if size is not None and not 1 <= size <= most:
            raise UserError(f"shortlist_size must lie in 1..{most}, got {size}.")
        shortlist = None if size is None else torch.arange(size)
        adapter = make_exit_adapter(view, config.kind, config.layer, shortlist, config.kv_layer)
    except UserError as error:
        raise UserError(f"exit_adapter {name_or_path}: {CONFIG_NAME}: {error}") from error
    fit_weights(adapter, weights, weights_path)
    if shortlist is not None:
        refuse_wrong_shortlist(weights["shortlist"], most, weights_path)
    attach_exit_adapter(model, adapter)
    return adapter


def is_exit_adapter(name_or_path: str, **hub: Any) -> bool:
    """Whether a folder or repository holds an exit adapter and no model."""
    if split_gguf(name_or_path)[1] is not None:
        return False
    adapter, model = (find_file(name_or_path, file, **hub) for file in (CONFIG_NAME, "config.json"))
    return adapter is not None and model is None


def read_exit_config(name_or_path: str, **hub: Any) -> ExitAdapterConfig:
    """What the exit adapter of a folder or hub repository is; raise UserError where there is none."""
    path = find_file(name_or_path, CONFIG_NAME, **hub)
    if path is None:
        raise UserError(f"exit_adapter: {name_or_path} has no {CONFIG_NAME}.")
    return ExitAdapterConfig.load(path)


def with_exit_adapter(model: PreTrainedModel, name_or_path: str, **hub: Any) -> PreTrainedModel:
    """A second model of the same modules and weights, with the exit adapter of a folder; the first stays as
    it is."""
    twin = twin_of(model)
    load_exit_adapter(twin, name_or_path, **hub)
    return twin


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same modules and weights: what is attached to it the first has not."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    return twin


@torch.no_grad()
def fit_weights(adapter: ExitAdapter, weights: dict[str, Tensor], path: Path) -> None:
    """Copy what a file holds; raise UserError unless it is exactly what the adapter has."""
    own = adapter.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in own.items()}
    held = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != held:
        differing = sorted(name for name in {*shapes, *held} if shapes.get(name) != held.get(name))
        raise UserError(f"{path} does not fit its configuration: {', '.join(differing)}.")
    for name, weight in own.items():
        weight.copy_(weights[name])


def refuse_wrong_shortlist(shortlist: Tensor, vocabulary: int, path: Path) -> None:
    """Raise UserError, which names the file, for ids that are none of the vocabulary's."""
    try:
        check_shortlist(shortlist, vocabulary)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def fingerprint_base(model: PreTrainedModel) -> str:
    """Tells a model's weights from others, in whichever dtype they are loaded: each rounded to bfloat16."""
    digest, seen = hashlib.sha256(), set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if name.startswith(f"{NAME}.") or weight.data_ptr() in seen or not weight.is_floating_point():
            continue
        seen.add(weight.data_ptr())  # tied weights once
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
