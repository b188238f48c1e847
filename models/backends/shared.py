"""What backends share: the view over a family's own one, and the cache that traced layers see."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import RLock
from typing import Any, Generic, TypeVar, cast

from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache

from models.families.buffers import hand_over
from models.families.stack import StackView

Pair = tuple[Tensor, Tensor]  # keys, values
Lent = TypeVar("Lent")


class BackendView:
    """Base of the backends' views, each a `models.decoder_view.DecoderView`: what the modules go on doing."""

    mixes_windows = False

    def __init__(self, eager: StackView) -> None:
        self.eager: Any = eager  # whose kind each backend knows
        self.model = eager.model
        self.num_layers = eager.num_layers
        self.max_positions = eager.max_positions
        self.exit_adapter = eager.exit_adapter

    def embed(self, state: Any, token_ids: Tensor) -> Tensor:
        return self.eager.embed(state, token_ids)

    def normalize(self, hidden: Tensor, layer: int) -> Tensor:
        return self.eager.normalize(hidden, layer)

    def project(self, normalized: Tensor) -> Tensor:
        return self.eager.project(normalized)

    def projection_onto(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        return self.eager.projection_onto(token_ids)

    def training_states(self, outputs: Any) -> tuple[Tensor, ...]:
        return self.eager.training_states(outputs)

    def training_labels(self, labels: Tensor) -> Tensor:
        return self.eager.training_labels(labels)

    def keep_all_layers(self) -> bool:
        return self.eager.keep_all_layers()


def deliver_copies(own: Iterable[Pair], memory: Iterable[Pair], cache: Cache | None) -> EncoderDecoderCache:
    """Copies of the layers' keys/values, their own and those of the source, in `cache` or in a new one."""
    return hand_over(EncoderDecoderCache(copied(own), copied(memory)), cache)


def copied(pairs: Iterable[Pair]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys.clone(), values.clone(), index)
    return cache


class Shelf(Generic[Lent]):
    """Lends out what takes long to make, by what it is made from; it comes back once its borrower is gone.

    `most_kept` are kept for the next borrower, those that came back last; None: all.
    """

    def __init__(self, make: Callable[..., Lent], most_kept: int | None = None) -> None:
        self.make = make
        self.most_kept = most_kept
        self.free: list[tuple[tuple[int, ...], Lent]] = []
        self.lock = RLock()  # a borrower may go while another is served by the same thread

    def lend(self, borrower: object, *settings: int) -> Lent:
        with self.lock:
            kept = next((one for one in self.free if one[0] == settings), None)
            # By identity: in between, a borrower that goes may have brought another.
            self.free = [one for one in self.free if one is not kept]
        lent = self.make(*settings) if kept is None else kept[1]
        weakref.finalize(borrower, self._keep, settings, lent).atexit = False
        return lent

    def _keep(self, settings: tuple[int, ...], lent: Lent) -> None:
        with self.lock:
            self.free = [(settings, lent), *self.free][: self.most_kept]


@dataclass
class MemoryLayer:
    keys: Tensor
    values: Tensor


class GivenMemory(EncoderDecoderCache):
    """Under Hugging Face's cache interface: what cross-attention makes of the source is there already."""

    def __init__(self, own: Any, memory: dict[int, Pair]) -> None:
        """`own`: what self-attention's `update` is called on; `memory`: by layer."""
        self.self_attention_cache = cast(Cache, own)
        self.cross_attention_cache = cast(Cache, self)
        self.layers = cast(Any, {index: MemoryLayer(*pair) for index, pair in memory.items()})
        self.is_updated = dict.fromkeys(memory, True)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return 0
