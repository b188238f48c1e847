"""Inputs of exported layers that depend on positions alone: made once for all layers of a step.

B rows, H heads, N capacity of the key/value buffers, Q new tokens, R query rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from onnxruntime import OrtValue
from torch import Tensor

from models.backends.onnx.grouping import Groups
from models.backends.onnx.rotation import TABLES

Array = np.ndarray
SMALLEST = np.finfo(np.float32).min  # that hides a key


def shared(array: Array) -> OrtValue:
    """What sessions read and write in the array's own memory."""
    return OrtValue.ortvalue_from_numpy(array)


def empty(*shape: int) -> Array:
    return np.empty(shape, np.float32)


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


class Tables(NamedTuple):
    """By which layers rotate queries and keys: for all places in buffers, (N, W / 2), or where rows number
    their tokens differently, for those of one row after the other, (B * N, W / 2)."""

    arrays: dict[str, Array]
    inputs: dict[str, OrtValue]  # the same
    rows: int  # 1 or B

    @classmethod
    def of(cls, rotations: dict[int, tuple[Tensor, Tensor]], capacity: int) -> Tables:
        """`rotations`: cosines and sines (B or 1, at least N, W) by owner, whose halves are alike."""
        arrays, rows = {}, 1
        for owner, rotation in rotations.items():
            for name, table in zip(TABLES, rotation, strict=True):
                rows, half = len(table), table.shape[-1] // 2
                assert torch.equal(table[..., :half], table[..., half:])
                arrays[f"{name}.{owner}"] = table[:, :capacity, :half].reshape(-1, half).numpy()
        return cls(arrays, {name: shared(array) for name, array in arrays.items()}, rows)

    def places(self, batch: int, count: int, capacity: int) -> Array:
        """(B, R): where the first `count` tokens of each row stand."""
        starts = np.arange(batch)[:, None] * capacity * (self.rows > 1)
        return starts + np.arange(count)


def chosen_rows(batch: int, new: int, rows: int) -> dict[str, Array]:
    """Of which tokens rows are, and which rows are the tokens', where heads are attended to one by one."""
    queries = np.minimum(np.arange(rows), new - 1)
    return {"row_count": np.full(batch, rows, np.int32), "queries": queries, "kept": np.arange(new)}


class Window:
    """Inputs that depend on positions, the same for all layers: of Q new tokens after `past` others."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        biases: Biases,
        exact: bool,
        padding: Array | None = None,
        tables: Tables | None = None,
        groups: Groups | None = None,
        grouped: bool = False,
    ) -> None:
        """`shape`: (B, Q, D); `exact`: a lone query has a copy beside it; `padding`: (B, 1, 1, P) additive;
        `tables`: of families that rotate; `groups`: of heads that share keys/values, `grouped`: whether they
        are attended to by group."""
        batch, new, _ = shape
        rows, group = max(new, 2) if exact else new, 1
        self.later: Array | None = None
        if grouped and groups is not None:
            rows, group, self.later = new * groups.size, groups.size, groups.later(new)
        self.biases = biases
        self.padding = padding
        self.hidden = torch.empty(shape)  # what layers read
        self.outputs = [torch.empty(shape), torch.empty(shape)]  # what they and an exit adapter made of it
        self.past = -1
        self.rows = rows
        self.last = np.zeros(batch, np.int32)
        held = batch if padding is not None else 1
        by_head = (held, biases.heads, group, rows // group, biases.capacity)
        self.bias_by_head = {owner: empty(*by_head) for owner in biases.rows_from}
        merged = (held, biases.heads, rows, biases.capacity)
        self.bias = {owner: array.reshape(merged) for owner, array in self.bias_by_head.items()}
        inputs: dict[str, Array] = {f"bias.{owner}": array for owner, array in self.bias.items()}
        inputs |= {"hidden": self.hidden.numpy(), "last": self.last, **chosen_rows(batch, new, rows)}
        if groups is not None:
            inputs |= groups.inputs(new, grouped)
        self.places: Array | None = None
        if tables is not None:
            self.first_places = np.tile(tables.places(batch, rows // group, biases.capacity), group)
            inputs["places"] = self.places = self.first_places.copy()
        self.inputs = {name: shared(array) for name, array in inputs.items()}
        self.inputs |= {} if tables is None else tables.inputs
        self.bound_outputs = [shared(output.numpy()) for output in self.outputs]

    def move(self, past: int) -> None:
        """Let the window follow `past` tokens."""
        if past == self.past:
            return
        self.past = past
        self.last[:] = past + self.rows - 1
        for owner, array in self.bias.items():
            by_head = self.bias_by_head[owner]
            self.biases.fill(owner, by_head[:, :, 0], past)
            if self.later is not None:  # a group's further heads stand where its first does
                by_head[:, :, 1:] = by_head[:, :, :1]
            if self.padding is not None:
                padding = self.padding[..., : array.shape[-1]]  # all of it once there is room for the prompt
                np.copyto(array[..., : padding.shape[-1]], SMALLEST, where=padding < 0)
            if self.later is not None:
                np.copyto(array[..., past : past + self.rows], SMALLEST, where=self.later)
        if self.places is not None:
            np.add(self.first_places, past, out=self.places)
