"""Keys/values in buffers with room to grow, under Hugging Face's cache interface.

Layers of Hugging Face models call `update` as they run; how many tokens a layer holds is `lengths[layer]` of
the generation's state, so that taking tokens back is setting a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from models.errors import UserError

Made = TypeVar("Made", bound=Cache)
INITIAL_CAPACITY = 64


class BufferLayer(DynamicLayer):
    """One layer's keys/values (B, H, N, W), of which the first `lengths[index]` count."""

    keys: Tensor
    values: Tensor
    is_initialized: bool

    def __init__(self, lengths: list[int], index: int) -> None:
        super().__init__()
        self.lengths = lengths
        self.index = index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, Q, W) keys/values; return all that count."""
        start = self.lengths[self.index]
        made = self.put(key_states, value_states, start)
        self.lengths[self.index] = start + key_states.shape[-2]
        return made

    def put(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write (B, H, Q, W) keys/values after the first `start`; return them all."""
        stop = start + keys.shape[-2]
        if not self.is_initialized or stop > self.keys.shape[-2]:
            self._grow(keys, values, start, stop)
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.lengths[self.index]

    def _grow(self, keys: Tensor, values: Tensor, held: int, needed: int) -> None:
        """Make room for `needed` tokens, of which `held` are there, and as many again."""
        old, capacity = (self.keys, self.values), max(INITIAL_CAPACITY, 2 * needed)
        self.keys = keys.new_empty(*keys.shape[:2], capacity, keys.shape[3])
        self.values = values.new_empty(*values.shape[:2], capacity, values.shape[3])
        for buffer, before in zip((self.keys, self.values), old if held else (), strict=False):
            buffer[:, :, :held] = before[:, :, :held]
        self.device, self.is_initialized = keys.device, True


class LodgerLayer(BufferLayer):
    """One whose keys/values lie in the buffer of another, which overwrites those beyond its own length."""

    def __init__(self, lengths: list[int], index: int, host: BufferLayer) -> None:
        super().__init__(lengths, index)
        self.host = host

    def put(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return self.host.put(keys, values, start)


def make_buffers(lengths: list[int], cache: Cache | None, lodgers: dict[int, int]) -> Cache:
    """Buffers of all layers, with what the layers of a given cache hold. `lodgers`: layers that have none of
    their own, and the ones with whom they lodge."""
    layers = [BufferLayer(lengths, index) for index in range(len(lengths))]
    for index, host in lodgers.items():
        layers[index] = LodgerLayer(lengths, index, layers[host])
    for index, layer in enumerate(cache.layers if cache is not None else ()):
        if index < len(layers) and layer.get_seq_length() > 0:
            layers[index].update(layer.keys, layer.values)
    return Cache(layers=layers)


def as_dynamic_cache(layers: Sequence[Any], length: int) -> DynamicCache:
    """A cache of Hugging Face's with copies of the first `length` tokens of the layers of another."""
    copies = DynamicCache()
    for index, layer in enumerate(layers if length > 0 else ()):
        copies.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
    return copies


def hand_over(made: Made, cache: Cache | None) -> Made:
    """What was made, in the caller's object if there is one, as `generate` fills it."""
    if cache is None:
        return made
    vars(cache).update(vars(made))
    return cast(Made, cache)


def refuse_uneven(lengths: list[int]) -> None:
    """Raise UserError for a given cache whose layers hold different tokens."""
    if len(set(lengths)) > 1:
        raise UserError(f"The given cache holds {lengths} tokens in its layers: not of one call.")
