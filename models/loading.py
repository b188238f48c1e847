"""Load or create a model with its tokenizer, exit heads and exit configuration.

`load_model(name_or_path)` reads hub ids, saves of ours, plain Hugging Face saves and original FREE
checkpoints; `create_model(config, tokenizer)` starts from random weights.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from models.errors import UserError
from models.exit_heads import (
    EXIT_CONFIG_NAME,
    HEAD_NAMES,
    ExitConfig,
    attach_exit_heads,
    exit_head_weights,
    load_exit_heads,
)

LOADING_ERRORS = (OSError, ValueError, SafetensorError, pickle.UnpicklingError)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "vocab.json",
)


@dataclass
class LoadedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    exit_config: ExitConfig


def load_model(
    name_or_path: str, tokenizer_name: str | None = None, dtype: torch.dtype = torch.float32, **hub: Any
) -> LoadedModel:
    """Load a checkpoint with everything it knows about exiting, as `dtype` however it is stored.

    `hub` takes cache_dir, revision and token.

    Raises:
        UserError: nothing loadable at `name_or_path`, or weights that do not fit the architecture.
    """
    exit_config = load_exit_config(name_or_path, **hub)
    try:
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            name_or_path, dtype=dtype, output_loading_info=True, **hub
        )
    except LOADING_ERRORS as error:
        raise UserError(f"Cannot load a model from {name_or_path}: {first_line(error)}") from error
    refuse_misfits(name_or_path, report)
    attach_exit_heads(model, exit_config)
    if any(hasattr(model, name) for name in HEAD_NAMES):
        load_exit_heads(model, exit_head_weights(read_weights(name_or_path, **hub)))
    if tokenizer_name not in (None, name_or_path):
        hub = {**hub, "revision": "main"}  # the revision is the model's
    tokenizer = load_tokenizer(tokenizer_name or name_or_path, model.config.vocab_size, **hub)
    return LoadedModel(model.eval(), tokenizer, exit_config)


def create_model(config_name: str, tokenizer_name: str, **hub: Any) -> LoadedModel:
    """A model with random weights from a config (hub id, folder or .json file)."""
    try:
        config = AutoConfig.from_pretrained(config_name, **hub)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot load a config from {config_name}: {first_line(error)}") from error
    tokenizer = load_tokenizer(tokenizer_name, config.vocab_size, **hub)
    try:
        model = AutoModelForSeq2SeqLM.from_config(config)
    except ValueError as error:
        raise UserError(f"{config_name}: {first_line(error)}") from error
    return LoadedModel(model, tokenizer, ExitConfig())


def load_tokenizer(name: str, vocab_size: int, **hub: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer, also from the lone `spiece.model` of original FREE checkpoints.

    Raises:
        UserError: there is none, or it has more tokens than the model's vocabulary.
    """
    if not any(find_file(name, file, **hub) for file in TOKENIZER_FILES):  # else an empty one would load
        raise UserError(f"{name} has no tokenizer. Name its base model's with --tokenizer_name.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot load a tokenizer from {name}: {first_line(error)}") from error
    if len(tokenizer) > vocab_size:
        raise UserError(f"{name} has {len(tokenizer)} tokens, but the model a vocab_size of {vocab_size}.")
    return tokenizer


def load_exit_config(name_or_path: str, **hub: Any) -> ExitConfig:
    """The checkpoint's exit configuration; all defaults where it has none."""
    files = (EXIT_CONFIG_NAME, "config.json")
    paths = [find_file(name_or_path, file, **hub) for file in files]
    return next((ExitConfig.load(path.parent) for path in paths if path is not None), ExitConfig())


def read_weights(name_or_path: str, **hub: Any) -> dict[str, Tensor]:
    """All weights of a single-file checkpoint, on the CPU."""
    for file in WEIGHT_FILES:
        path = find_file(name_or_path, file, **hub)
        if path is not None:
            is_safe = path.suffix == ".safetensors"
            return load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    raise UserError(f"{name_or_path} has exit heads, but neither of {', '.join(WEIGHT_FILES)}.")


def find_file(name_or_path: str, file: str, **hub: Any) -> Path | None:
    """Local path of a checkpoint's file, downloaded if need be; None where it has no such file."""
    try:
        path = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as error:  # neither a folder nor a repository
        raise UserError(f"Cannot find {name_or_path}: {first_line(error)}") from error
    return None if path is None else Path(path)


def refuse_misfits(name_or_path: str, report: dict[str, Any]) -> None:
    """Raise UserError if weights are missing, mis-shaped or unknown; exit heads are read separately."""
    unexpected = [key for key in report["unexpected_keys"] if key.split(".")[0] not in HEAD_NAMES]
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(unexpected),
        "wrong shape": sorted(str(key) for key in report["mismatched_keys"]),
    }
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise UserError(f"{name_or_path} does not fit its architecture; {'; '.join(found)}.")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
