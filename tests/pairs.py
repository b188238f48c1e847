"""Which cases of a matrix run by default; with ALL_PAIRS=1 all of them do.

A matrix of families, policies, losses and precisions costs more than it finds: by default each value occurs
in some case, and what is the same for several families is tested with one of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

ALL_PAIRS = bool(os.environ.get("ALL_PAIRS"))
# Two families with and two without an encoder, each with layers of its own kind: the others are slow.
QUICK = ("t5-tied", "bart-tied", "llama-tied", "gpt2-tied")


def thin(whole: Iterable[Any], chosen: Iterable[Any]) -> list[Any]:
    """The `chosen` cases of the `whole`."""
    whole, chosen = list(whole), list(chosen)
    assert all(case in whole for case in chosen), f"Not all of {chosen} are cases of {whole}."
    return whole if ALL_PAIRS else chosen


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """As many cases as the longest axis has values, while the others take turns: each value occurs."""
    turns = [tuple(axis[turn % len(axis)] for axis in axes) for turn in range(max(map(len, axes)))]
    return thin(itertools.product(*axes), turns)


def slow_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, marked as slow but for the `quick` ones: a value, all values, or the first of several."""
    quick, marked = list(quick), []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in quick or values[0] in quick else (pytest.mark.slow,)
        marked.append(pytest.param(*values, marks=marks))
    return marked
