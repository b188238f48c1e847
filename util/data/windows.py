"""Long texts in overlapping pieces, whether or not a tokenizer says where its tokens lie."""

from __future__ import annotations

import bisect
from functools import partial

from transformers import PreTrainedTokenizerBase


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int, stride: int) -> list[str]:
    """Pieces of at most `length` tokens, neighbours sharing `stride` of them."""
    if not tokenizer.is_fast:
        return split_by_measuring(text, tokenizer, length, stride)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= length:
        return [text]
    starts = range(0, len(offsets) - stride, length - stride)
    return [text[offsets[start][0] : offsets[min(start + length, len(offsets)) - 1][1]] for start in starts]


def split_by_measuring(text: str, tokenizer: PreTrainedTokenizerBase, length: int, stride: int) -> list[str]:
    """`split_text` for tokenizers that do not say where their tokens lie: they are asked for the length of
    every piece that is tried. Neighbours share at most `stride` tokens."""

    def count(start: int, end: int) -> int:
        return len(tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids)

    def room(end: int, start: int) -> int:  # rises with the start
        return -count(start, end)

    pieces, start = [], 0
    while True:
        ends = range(start + 1, len(text) + 1)
        fitting = bisect.bisect_right(ends, length, key=partial(count, start))
        end = start + max(1, fitting)
        pieces.append(text[start:end])
        if end >= len(text):
            return pieces
        starts = range(start + 1, end)
        start += 1 + bisect.bisect_left(starts, -stride, key=partial(room, end))
