"""`.gguf` files, as llama.cpp reads them: transformers loads them, dequantized."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models.checkpoint_files import LOADING_ERRORS, first_line
from models.errors import UserError
from models.families import check_family

SUFFIX = ".gguf"


def split_gguf(name: str) -> tuple[str, str | None]:
    """Folder or repository of a `.gguf` file, and its name there; None for what is no such file."""
    path = Path(name)
    if path.suffix != SUFFIX or path.is_dir():
        return name, None
    return str(path.parent), path.name


def load_gguf(name: str, dtype: torch.dtype, **hub: Any) -> PreTrainedModel:
    """The model of a `.gguf` file, a plain one of `dtype`.

    Raises:
        UserError: no such file, no model of a family that there is, or the package gguf is missing.
    """
    home, file = split_gguf(name)
    options = {"gguf_file": file, "trust_remote_code": False, **hub}
    try:
        check_family(AutoConfig.from_pretrained(home, **options).model_type)
        model = AutoModelForCausalLM.from_pretrained(home, dtype=dtype, **options)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{name} needs the package gguf: pip install gguf ({first_line(error)}).") from error
    except (*LOADING_ERRORS, struct.error) as error:  # the latter of a file that ends too early
        raise UserError(f"Cannot load a model from {name}: {first_line(error)}") from error
    model.hf_quantizer.remove_quantization_config(model)  # else it could not be saved
    return model
