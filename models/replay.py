"""FREE's decisions replayed on what an exit said along an output: which steps and passes they would take."""

from __future__ import annotations

import numpy as np

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CAPS = (1, 2, 3, 4, 6, 8)  # tokens that wait at most, of lossless decoding


def replay(sure: np.ndarray, agrees: np.ndarray, cap: int | None, lossless: bool) -> tuple[int, list[int]]:
    """Shallow steps that a sequence of T tokens takes, and the tokens of each deep pass.

    Step 1. Tokens exit and wait as long as the exit is sure and not more than `cap` wait. (What follows a
    wrong draft is not known; the exit is taken to be as sure there as along the right output.)
    Step 2. The next one runs the deep layers together with them.
    Step 3. Lossless, the first wrong draft and all after it go; the deep pass has said what comes instead.
    """
    length, place, steps, windows = len(sure), 0, 0, []
    while place < length:
        stop = place
        while stop < length and sure[stop] and (cap is None or stop - place < cap):
            stop += 1
        drafts, closing = stop - place, stop == length
        steps += drafts + (not closing)
        if lossless or not closing:  # what still waits at the end only lossless decoding verifies
            windows.append(drafts + (not closing))
        wrong = np.flatnonzero(~agrees[place:stop])
        place = place + int(wrong[0]) + 1 if lossless and len(wrong) else stop + 1
    return steps, windows
