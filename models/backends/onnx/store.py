"""Exported pieces on disk: a second run starts without exporting anything.

A store is the folder of one model in one precision, named by a fingerprint of all that the pieces depend on;
each piece is a folder in it. Weights lie in files of their own, which sessions map into memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.errors import UserError
from models.exit_adapter import NAME
from models.families.stack import StackView

MODELS = Path(__file__).parents[2]
TOLD = {MODELS.name, "torch", "transformers", *sys.stdlib_module_names}  # whose code `makers` tells
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
GRAPH, WEIGHTS, SUMS = "graph.onnx", "weights.bin", "sums.json"
EMBEDDED = 1024  # bytes; smaller tensors stay in the graph

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "exitlm" / "onnx"


@cache
def makers() -> str:
    """A hash of what makes the graphs: libraries, and the code here and of the families."""
    digest = hashlib.sha256("\n".join(f"{name} {version(name)}" for name in LIBRARIES).encode())
    traced = [MODELS / "exit_adapter.py", MODELS / "backends/shared.py", *MODELS.glob("families/*.py")]
    for path in sorted([*Path(__file__).parent.glob("*.py"), *traced]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def foreign_code(view: StackView) -> str:
    """A hash of the code from outside that a model and its view run, which no version tells; empty where
    there is none."""
    kinds = {type(view), *map(type, view.model.modules())}
    bases = {base for kind in kinds for base in kind.__mro__ if base.__module__.split(".")[0] not in TOLD}
    if not bases:
        return ""
    digest = hashlib.sha256()
    for base in sorted(bases, key=lambda base: (base.__module__, base.__qualname__)):
        digest.update(f"{base.__module__} {base.__qualname__}\n".encode())
        digest.update(source_of(base))
    return digest.hexdigest()[:32]


@cache
def source_of(kind: type) -> bytes:
    """The file that a class is written in; of one that was typed into a console, bytes of this run alone."""
    path = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return uuid.uuid4().bytes if path is None else Path(path).read_bytes()


@cache
def processor() -> str:
    """A hash of what the processor can do, by which ONNX Runtime chooses its kernels."""
    able = sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    return hashlib.sha256(" ".join(able).encode()).hexdigest()[:16]


def fingerprint(model: PreTrainedModel, precision: str, foreign: str) -> str:
    """A name for what is exported: libraries, code (ours, and `foreign`), configuration, every weight,
    precision. An exit adapter, whose pieces have names of their own, is left out."""
    weights = model.state_dict(keep_vars=True)
    own = {name: weight for name, weight in weights.items() if not name.startswith(f"{NAME}.")}
    return hash_weights(own, makers(), foreign, precision, model.config.to_json_string())


def hash_weights(weights: dict[str, Tensor], *context: str) -> str:
    digest = hashlib.sha256("\n".join(context).encode())
    seen: set[int] = set()
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.data_ptr() not in seen:  # tied weights once
            digest.update(weight.detach().contiguous().flatten().numpy().view(np.uint8).data)
        seen.add(weight.data_ptr())
    return digest.hexdigest()[:32]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise UserError where `folder` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache_dir {folder} of backend onnx cannot be written ({error}): name another folder."
        ) from error


class Store:
    """Pieces by name, in `folder`: UserError wherever it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        self.whole: set[str] = set()  # pieces whose files were checked, or written, by this process
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def piece(self, name: str, build: Callable[[], ir.Model]) -> ir.Model:
        """The piece `name` as stored, or else as `build` makes it, which is then stored."""
        path = self.folder / name
        if name not in self.whole and not (path.exists() and is_whole(path)):
            if path.exists():
                logger.warning("%s is damaged or foreign: it is made again.", path)
            self._write(path, build())
            self.made += 1
        self.whole.add(name)
        return self._read(path)

    def _read(self, path: Path) -> ir.Model:
        """A stored piece; where its weights lie is told relative to the store, as segments need it."""
        model = ir.load(path / GRAPH)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    f"{path.name}/{WEIGHTS}",
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=str(value.name),
                    base_dir=self.folder,
                )
        return model

    def _write(self, path: Path, model: ir.Model) -> None:
        """Write a piece aside, then give it its name; one that another process has just made is kept."""
        with writing(self.folder), tempfile.TemporaryDirectory(dir=self.folder, prefix=".") as aside:
            made = Path(aside) / "piece"
            made.mkdir()
            ir.save(model, made / GRAPH, external_data=WEIGHTS, size_threshold_bytes=EMBEDDED)
            (made / SUMS).write_text(json.dumps(sums(made)))
            if path.exists() and not is_whole(path):
                path.rename(Path(aside) / "damaged")
            try:
                made.rename(path)
            except OSError:
                if not is_whole(path):
                    raise


def sums(folder: Path) -> dict[str, str]:
    """Checksums of a piece's files."""
    digests = {}
    for name in (GRAPH, WEIGHTS):
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def is_whole(folder: Path) -> bool:
    """Whether the files of a stored piece are those that were written."""
    try:
        return json.loads((folder / SUMS).read_text()) == sums(folder)
    except (OSError, ValueError):
        return False
