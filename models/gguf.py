"""`.gguf` files, as llama.cpp reads them: transformers loads them, dequantized."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models.checkpoint_files import LOADING_ERRORS, first_line, split_gguf
from models.errors import UserError
from models.families import check_family

READING = threading.RLock()  # while transformers is shown another reader than the package's


@contextmanager
def parsed_once(name: str) -> Iterator[None]:
    """While model and tokenizer of a `.gguf` file are loaded, parse it once, and list the possible names of
    its tensors once. Transformers parses it for config, weights and tokenizer each, and lists names for each
    module."""
    try:
        gguf = None if split_gguf(name)[1] is None else import_module("gguf")
    except ImportError:  # which `load_gguf` tells
        gguf = None
    if gguf is None:
        yield
        return
    with READING:
        reader, names = cache(quick(gguf.GGUFReader)), cache(gguf.get_tensor_name_map)
        with patch.multiple(gguf, GGUFReader=reader, get_tensor_name_map=names):
            yield


def quick(reader: Any) -> Any:
    """The reader class, with a plain view of the file: slices of a `numpy.memmap`, one for each string of a
    vocabulary, take several times as long."""

    class Reader(reader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(numpy.ndarray) if name == "data" else value)

    return Reader


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
