"""The names of methods, as flags choose them and results record them."""

from __future__ import annotations

BASELINE = "Full depth"
HF_GENERATE = "HF generate"
STATIC = "Static"
FREE = "FREE"
FREE_ADAPTIVE = "FREE adaptive"
FREE_LOSSLESS = "FREE lossless"
FREE_SHORTLIST = "FREE shortlist"
CALM = "CALM"


def with_lookup(method: str, tokens: int | None) -> str:
    """The name of a method where lookups propose `tokens`; None: where there are none."""
    return method if tokens is None else f"{method}, lookup {tokens}"


def without_lookup(method: str) -> str:
    return method.partition(", lookup ")[0]


SWEPT = (HF_GENERATE, STATIC, FREE, FREE_ADAPTIVE, FREE_LOSSLESS, FREE_SHORTLIST, CALM)
