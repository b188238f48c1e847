"""Files of checkpoints, in a folder or on the hub: found, read, and named where they are damaged."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from models.errors import UserError
from models.json_files import fits, read_mapping

LOADING_ERRORS = (  # what torch and transformers raise for files that are damaged or say impossible things
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
GGUF_SUFFIX = ".gguf"
LFS_POINTER = b"version https://git-lfs"


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise UserError(f"{path} cannot be read: {find_damage(path.parent) or first_line(error)}") from error


def read_names(path: Path) -> list[str]:
    """The names of a file's weights, which safetensors lists at its head."""
    if path.suffix != ".safetensors":
        return list(read_weights(path))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except LOADING_ERRORS as error:
        raise UserError(f"{path} cannot be read: {find_damage(path.parent) or first_line(error)}") from error


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder's weight files, if they never arrived or their index is none."""
    for path in folder.glob("*.index.json"):
        if not fits(read_mapping(path).get("weight_map"), dict[str, str]):
            return f"{path.name} lacks a weight_map from names to files."
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
            if not start:
                return f"{path.name} is empty; copy or download it again."
            if start == LFS_POINTER:
                return f"{path.name} is only a pointer; run `git lfs pull` where it was cloned."
    return None


def find_file(name_or_path: str, file: str, **hub: Any) -> Path | None:
    """Local path of a checkpoint's file, downloaded if need be; None where it has no such file."""
    try:
        path = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as error:  # neither a folder nor a repository
        raise UserError(f"Cannot find {name_or_path}: {first_line(error)}") from error
    return None if path is None else Path(path)


def first_line(error: Exception) -> str:
    """The start of an error's text, with the kind where that says nothing; two lines after a colon."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def split_gguf(name: str) -> tuple[str, str | None]:
    """Folder or repository of a `.gguf` file, and its name there; None for what is no such file."""
    path = Path(name)
    if path.suffix != GGUF_SUFFIX or path.is_dir():
        return name, None
    return str(path.parent), path.name
