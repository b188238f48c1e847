"""Wall-clock timing that waits for the accelerator only at the edges of what is timed."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """`with Stopwatch(device) as watch: ...` then `watch.seconds`."""

    def __init__(self, device: torch.device, synchronize: bool = True) -> None:
        self.device = device
        self.synchronize = synchronize and device.type != "cpu"
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self.start = self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = self._now() - self.start

    def _now(self) -> float:
        if self.synchronize:
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()
