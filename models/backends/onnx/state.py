"""What one generation holds on the ONNX Runtime backend: buffers that sessions read and write in place.

B rows, H heads, W their width, N capacity, S source tokens, Q new tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.backends.onnx.engine import Session
from models.backends.onnx.windows import Array, Window
from models.backends.shared import Pair
from models.decoder_view import DecoderState

INITIAL_CAPACITY = 64


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
