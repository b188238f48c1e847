"""From flags to the backend that runs a model."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from models.backends import prepare, why_not_onnx
from models.loading import LoadedModel
from util.backend_arguments import AUTOMATIC, BackendArguments


class Threaded(Protocol):
    """Flags with --threads."""

    @property
    def threads(self) -> int | None: ...


def limit_threads(flags: Threaded) -> None:
    """Let torch use as many threads as the flags say; exported graphs follow."""
    if flags.threads:
        torch.set_num_threads(flags.threads)


def run_by_backend(loaded: LoadedModel, flags: BackendArguments) -> LoadedModel:
    """The model, which is where it will decode, run by the backend that the flags ask for.

    Raises:
        UserError: that backend cannot run it; `auto` takes torch then, unless a precision asks for onnx.
    """
    backend = flags.backend
    if backend == AUTOMATIC:
        asked = flags.precision != "fp32" or flags.exit_precision is not None
        backend = "onnx" if asked or not why_not_onnx(loaded) else "torch"
    own: dict[str, Any] = {"cache_dir": flags.onnx_cache_dir, "exit_precision": flags.exit_precision}
    return prepare(loaded, backend, flags.precision, **(own if backend == "onnx" else {}))
