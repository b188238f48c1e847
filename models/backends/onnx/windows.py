"""Inputs of exported layers that depend on positions alone: made once for all layers of a step.

B rows, H heads, N capacity of the key/value buffers, Q new tokens, R query rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from onnxruntime import OrtValue
from torch import Tensor

Array = np.ndarray


def shared(array: Array) -> OrtValue:
    """What sessions read and write in the array's own memory."""
    return OrtValue.ortvalue_from_numpy(array)


class Biases:
    """Relative biases of the layers that own some, by distance: rows for any window of a capacity."""

    def __init__(self, by_distance: dict[int, Tensor | None], heads: int, capacity: int) -> None:
        """`by_distance`: (H, N) of each owner, None where positions are embedded."""
        self.heads = heads
        self.capacity = capacity
        self.rows_from = {
            owner: None if bias is None else self._windows(bias.detach().numpy())
            for owner, bias in by_distance.items()
        }

    def _windows(self, by_distance: Array) -> Array:
        """(H, N, N): [:, o] are the biases of all keys for the query at position N - 1 - o. Later keys have
        some, too, which masks exclude."""
        reversed_ = np.concatenate([by_distance[:, ::-1], np.zeros_like(by_distance)], 1)
        heads, step = reversed_.strides
        return as_strided(reversed_, (self.heads, self.capacity, self.capacity), (heads, step, step))

    def fill(self, owner: int, out: Array, start: int) -> None:
        """Write into (B, H, R, N) those of the queries at `start`..`start + R - 1`."""
        windows = self.rows_from[owner]
        if windows is None:
            out[...] = 0
            return
        last = self.capacity - 1 - start
        out[...] = windows[:, last - out.shape[2] + 1 : last + 1][:, ::-1]


class Window:
    """Inputs that depend on positions, the same for all layers: of Q new tokens after `past` others."""

    def __init__(
        self, batch: int, new: int, model_width: int, biases: Biases, padding: Array | None, exact: bool
    ) -> None:
        """`padding`: (B, 1, 1, P) additive; `exact`: a lone query has a copy beside it."""
        rows = max(new, 2) if exact else new
        self.biases = biases
        self.padding = padding
        self.hidden = torch.empty(batch, new, model_width)  # what layers read
        self.output = torch.empty(batch, new, model_width)  # what they made of it
        self.past = -1
        self.rows = rows
        self.last = np.zeros(batch, np.int32)
        held = batch if padding is not None else 1
        shape = (held, biases.heads, rows, biases.capacity)
        self.bias = {owner: np.zeros(shape, np.float32) for owner in biases.rows_from}
        inputs = {f"bias.{owner}": array for owner, array in self.bias.items()} | {
            "hidden": self.hidden.numpy(),
            "last": self.last,
            "row_count": np.full(batch, rows, np.int32),
            "queries": np.minimum(np.arange(rows), new - 1),
            "kept": np.arange(new),
        }
        self.inputs = {name: shared(array) for name, array in inputs.items()}
        self.bound_output = shared(self.output.numpy())

    def move(self, past: int) -> None:
        """Let the window follow `past` tokens."""
        if past == self.past:
            return
        self.past = past
        self.last[:] = past + self.rows - 1
        for owner, array in self.bias.items():
            self.biases.fill(owner, array, past)
            if self.padding is not None:
                array[..., : self.padding.shape[-1]] += self.padding
