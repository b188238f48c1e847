"""When the next request may start."""

from __future__ import annotations

import asyncio
import time
from collections import deque


class RateLimiter:
    """Starts requests so that no minute has more of them, or of their tokens, than allowed.

    Requests are spaced evenly, as endpoints refuse bursts; tokens are counted over the last `window` seconds.
    """

    def __init__(self, requests: float, tokens: float, window: float = 60.0) -> None:
        self.tokens = tokens
        self.window = window
        self.gap = window / requests
        self._starts: deque[tuple[float, int]] = deque()
        self._used = 0
        self._ready = 0.0
        self._turn = asyncio.Lock()

    async def acquire(self, tokens: int) -> None:
        """Wait for a start; those who ask first start first."""
        async with self._turn:
            while (delay := self._delay(tokens)) > 0:
                await asyncio.sleep(delay)
            now = time.monotonic()
            self._starts.append((now, tokens))
            self._used += tokens
            self._ready = max(self._ready, now + self.gap)

    def hold(self, seconds: float) -> None:
        """Start nothing for a while: the endpoint asked for it."""
        self._ready = max(self._ready, time.monotonic() + seconds)

    def _delay(self, tokens: int) -> float:
        now = time.monotonic()
        while self._starts and self._starts[0][0] <= now - self.window:
            self._used -= self._starts.popleft()[1]
        ready = self._ready
        if self._starts and self._used + tokens > self.tokens:
            ready = max(ready, self._starts[0][0] + self.window)
        return ready - now
