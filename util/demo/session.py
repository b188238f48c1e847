"""The models of the page: loaded once for each choice, the least recently used given up."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch

from models.backends import prepare
from models.errors import UserError
from models.loading import LoadedModel, load_model
from models.prompts import Prompt
from util.data.encoding import Encoder, make_encoder
from util.demo.examples import template_of
from util.device import best_device, move_model

Kept = TypeVar("Kept")
Named: TypeAlias = tuple[str, str, torch.device]  # checkpoint, exit adapter, where
ON_THE_PAGE = ("torch", "onnx")  # backends; compiling takes minutes for each shape


@dataclass(frozen=True)
class Choice:
    """Which model, and what runs it."""

    checkpoint: str
    exit_adapter: str = ""
    backend: str = "torch"
    precision: str = "fp32"


@dataclass
class OpenModel:
    """A model ready to decode; `plain` is the same in its own modules, for analysis."""

    fast: LoadedModel
    plain: LoadedModel
    encoder: Encoder
    warm: set[tuple[str, int]] = field(default_factory=set)  # methods and layers that have decoded before

    @property
    def num_layers(self) -> int:
        return self.plain.view.num_layers

    @property
    def shallow_layer(self) -> int:
        """The exit that the checkpoint was trained with; about a third of the depth where there is none."""
        return self.plain.exit_config.shallow_exit_layer or max(1, self.num_layers // 3)


class Session:
    """Opens models for all requests, one at a time."""

    def __init__(self, models_kept: int = 3, offered: tuple[str, ...] | None = None) -> None:
        """`offered`: the only checkpoints that may be opened; None: any."""
        self.offered = offered
        self.loading = threading.Lock()  # held for as long as a hub takes to answer
        self.lock = threading.Lock()  # of what is kept
        self.loaded: Recent[LoadedModel] = Recent(models_kept)
        self.opened: Recent[OpenModel] = Recent(models_kept)

    def open(self, choice: Choice) -> OpenModel:
        """The model of a choice.

        Raises:
            UserError: it is not offered, cannot be loaded, or not run so.
        """
        self._check(choice)
        device = best_device() if choice.backend == "torch" else torch.device("cpu")
        named = (choice.checkpoint, choice.exit_adapter, device)
        if (opened := self._find(choice, named)) is not None:
            return opened
        with self.loading:
            opened = self._find(choice, named)  # loaded by another request in the meantime
            return opened or self._open(choice, named)

    def is_open(self, choice: Choice) -> bool:
        """Whether `open` returns at once."""
        with self.lock:
            return choice in self.opened

    def _find(self, choice: Choice, named: Named) -> OpenModel | None:
        with self.lock:
            self.loaded.get(named)
            return self.opened.get(choice)

    def _open(self, choice: Choice, named: Named) -> OpenModel:
        with self.lock:
            plain = self.loaded.get(named)
        plain = plain or load(*named)
        opened = run_as_chosen(plain, choice)
        with self.lock:
            self.loaded.put(named, plain)
            kept = {*map(id, self.loaded.values())}
            for other in [one for one, model in self.opened.items() if id(model.plain) not in kept]:
                del self.opened[other]
            self.opened.put(choice, opened)
        return opened

    def _check(self, choice: Choice) -> None:
        if not choice.checkpoint:
            raise UserError("Checkpoint: choose one.")
        if choice.backend not in ON_THE_PAGE:
            raise UserError(f"Backend: {choice.backend!r} is none of {', '.join(ON_THE_PAGE)}.")
        if self.offered is not None and (choice.checkpoint not in self.offered or choice.exit_adapter):
            raise UserError("Checkpoint: choose one of the list; this page takes no others.")


class Recent(OrderedDict[Any, Kept]):
    """The `most` values that were put or asked for last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            self.move_to_end(key)
        return super().get(key, default)

    def put(self, key: Any, value: Kept) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)


def run_as_chosen(plain: LoadedModel, choice: Choice) -> OpenModel:
    fast = prepare(plain, choice.backend, choice.precision)
    return OpenModel(fast, plain, make_encoder(plain.tokenizer, plain.prompt))


def load(checkpoint: str, exit_adapter: str, device: torch.device) -> LoadedModel:
    """A checkpoint on a device, with its exit adapter if one is named, that knows how it is asked.

    Raises:
        UserError: it cannot be loaded, or has no layer to exit after.
    """
    loaded = load_model(checkpoint, exit_adapter=exit_adapter or None)
    if loaded.view.num_layers < 2:
        raise UserError(f"{checkpoint} has one layer only, and none to exit after.")
    if not loaded.model.config.is_encoder_decoder:
        chat = loaded.tokenizer.chat_template is not None
        loaded.prompt = Prompt(template_of(checkpoint), chat)
    move_model(loaded.model, device)
    return loaded
