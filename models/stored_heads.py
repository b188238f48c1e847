"""What the files of a checkpoint hold of exits: the configuration and the weights of heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from models.checkpoint_files import find_file, read_names, read_weights
from models.exit_heads import (
    EXIT_CONFIG_NAME,
    ExitConfig,
    attach_exit_heads,
    exit_head_weights,
    is_head_weight,
)
from models.json_files import read_mapping

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
DECODER_LM_HEAD = "decoder.lm_head.weight"


def load_exit_config(name_or_path: str, **hub: Any) -> ExitConfig:
    """The checkpoint's exit configuration; all defaults where it has none."""
    files = (EXIT_CONFIG_NAME, "config.json")
    paths = [find_file(name_or_path, file, **hub) for file in files]
    return next((ExitConfig.load(path.parent) for path in paths if path is not None), ExitConfig())


def read_extra_weights(name_or_path: str, **hub: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint that belong to exit heads or to a second LM head, from one file or from
    shards, on the CPU."""
    for file in WEIGHT_FILES:
        index = find_file(name_or_path, f"{file}.index.json", **hub)
        if index is not None:
            places = read_mapping(index)["weight_map"]  # whole, as the model came from it
            shards = {shard for name, shard in places.items() if is_extra_weight(name)}
            paths = [find_file(name_or_path, shard, **hub) for shard in sorted(shards)]
        else:
            paths = [find_file(name_or_path, file, **hub)]
        weights = {name: tensor for path in paths if path for name, tensor in read_weights(path).items()}
        if weights:
            return {name: tensor for name, tensor in weights.items() if is_extra_weight(name)}
    return {}


def read_head_names(name_or_path: str, **hub: Any) -> list[str]:
    """The names of a checkpoint's weights that belong to exit heads."""
    for file in WEIGHT_FILES:
        index = find_file(name_or_path, f"{file}.index.json", **hub)
        if index is not None:
            return [name for name in read_mapping(index)["weight_map"] if is_head_weight(name)]
        whole = find_file(name_or_path, file, **hub)
        if whole is not None:
            return [name for name in read_names(whole) if is_head_weight(name)]
    return []


def is_extra_weight(name: str) -> bool:
    return is_head_weight(name) or name == DECODER_LM_HEAD


def attach_stored_heads(model: PreTrainedModel, exit_config: ExitConfig, names: Iterable[str]) -> ExitConfig:
    """Attach the heads that the configuration announces, and those that a checkpoint holds, by the `names` of
    its weights; the configuration with these."""
    names = [*names]
    extended, stored = with_stored_heads(exit_config, names), stored_exits(names)
    attach_exit_heads(model, extended, stored, only=bool(stored) and exit_config.per_exit_head is None)
    return extended


def with_stored_heads(exit_config: ExitConfig, names: Iterable[str]) -> ExitConfig:
    """The configuration, extended by heads that a checkpoint holds, by the `names` of its weights, but does
    not announce."""
    found = exit_head_weights(dict.fromkeys(names))
    stored, layers, shallow = {name.split(".")[0] for name in found}, stored_exits(found), None
    kind = exit_config.per_exit_head
    if kind is None and layers:
        kind = "projection" if any(name.endswith(".linear.weight") for name in found) else "norm"
        shallow = min(layers) if len(layers) == 1 else None
    return replace(
        exit_config,
        train_meta_cm_head=exit_config.train_meta_cm_head or "cm_head" in stored,
        do_layer_transformation=exit_config.do_layer_transformation or "layer_transformation" in stored,
        per_exit_head=kind,
        shallow_exit_layer=exit_config.shallow_exit_layer or shallow,
    )


def stored_exits(names: Iterable[str]) -> set[int]:
    """Layers of the per-exit heads that weights belong to."""
    parts = (name.split(".") for name in exit_head_weights(dict.fromkeys(names)))
    return {int(layer) for head, layer, *_ in parts if head == "per_exit_heads" and layer.isdecimal()}
