"""What one generation holds on the ONNX Runtime backend: buffers that sessions read and write in place.

B rows, H heads, W their width, N capacity, S source tokens, Q new tokens, R query rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

from models.backends.onnx.engine import Session
from models.decoder_view import DecoderState

INITIAL_CAPACITY = 64
Pair = tuple[Tensor, Tensor]
Array = np.ndarray


class OnnxState(DecoderState):
    """Keys/values of every layer, (B, H, N, W) each, N growing, and of the source, (B, H, S, W)."""

    def __init__(self, memory: list[Pair], source_mask: Array, padding: Array | None) -> None:
        super().__init__(len(memory))
        self.memory = memory
        self.source_mask = source_mask  # (B, S) int32, 0 at padding
        self.padding = padding  # (B, 1, 1, P) additive, where prompts are padded
        self.capacity = 0
        self.buffers: list[Pair] = []
        self.windows: dict[int, Window] = {}  # by the number of new tokens
        self.segments: dict[tuple[int, int], BoundSegment] = {}  # by first layer and the one after the last

    @property
    def batch_size(self) -> int:
        return len(self.source_mask)

    def reserve(self, needed: int) -> None:
        """Make room for `needed` tokens in every layer."""
        if needed <= self.capacity:
            return
        self.capacity = max(INITIAL_CAPACITY, 2 * needed)
        _, heads, _, width = self.memory[0][0].shape
        grown = torch.zeros(len(self.lengths), 2, self.batch_size, heads, self.capacity, width)
        for new, old, held in zip(grown, self.buffers, self.lengths, strict=False):
            for ours, before in zip(new, old, strict=True):
                ours[:, :, :held] = before[:, :, :held]
        self.buffers = [tuple(layer) for layer in grown]
        self.windows.clear()
        self.segments.clear()

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append (B, H, Q, W) keys/values to those of a layer, for which there is room."""
        start = self.lengths[layer]
        stop = start + keys.shape[2]
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer[:, :, start:stop] = new
        self.lengths[layer] = stop


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

    def __init__(self, state: OnnxState, biases: Biases, new: int, model_width: int, exact: bool) -> None:
        rows = max(new, 2) if exact else new  # a lone query has a copy beside it
        batch = state.batch_size
        self.biases = biases
        self.padding = state.padding
        self.hidden = torch.empty(batch, new, model_width)  # what layers read
        self.output = torch.empty(batch, new, model_width)  # what they made of it
        self.past = -1
        self.rows = rows
        self.last = np.zeros(batch, np.int32)
        held = batch if state.padding is not None else 1
        shape = (held, biases.heads, rows, biases.capacity)
        self.bias = {owner: np.zeros(shape, np.float32) for owner in biases.rows_from}
        self.inputs: dict[str, Array] = {f"bias.{owner}": array for owner, array in self.bias.items()}
        self.inputs["hidden"] = self.hidden.numpy()
        self.inputs |= {
            "last": self.last,
            "row_count": np.full(batch, rows, np.int32),
            "queries": np.minimum(np.arange(rows), new - 1),
            "kept": np.arange(new),
        }

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


class BoundSegment:
    """Layers `start`..`stop - 1` with the buffers of one generation bound to their inputs and outputs."""

    def __init__(self, session: Session, state: OnnxState, start: int, stop: int) -> None:
        self.session = session
        self.binding = session.io_binding()
        self.names = {node.name for node in session.get_inputs()}
        self.window: Window | None = None
        self.capacity = np.array(state.capacity, np.int32)
        self._bind_array("capacity", self.capacity)
        self._bind_array("source_mask", state.source_mask)
        for layer in range(start, stop):
            for part, buffer, memory in zip(
                ("keys", "values"), state.buffers[layer], state.memory[layer], strict=True
            ):
                self._bind(f"past_{part}.{layer}", buffer)
                self._bind(f"memory_{part}.{layer}", memory)
                self._bind_output(f"written_{part}.{layer}", buffer)

    def run(self, hidden: Tensor, window: Window) -> Tensor:
        """(B, Q, D) states through the layers."""
        if window is not self.window:
            for name in self.names & window.inputs.keys():
                self._bind_array(name, window.inputs[name])
            self._bind_output("hidden_out", window.output)
            self.window = window
        window.hidden.copy_(hidden)
        self.session.run_with_iobinding(self.binding)
        return window.output.clone()  # as policies keep states while the window is used again

    def _bind(self, name: str, tensor: Tensor) -> None:
        self.binding.bind_input(name, "cpu", 0, np.float32, tensor.shape, tensor.data_ptr())

    def _bind_array(self, name: str, array: Array) -> None:
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, tensor: Tensor) -> None:
        self.binding.bind_output(name, "cpu", 0, np.float32, tensor.shape, tensor.data_ptr())
