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
SWEPT = (HF_GENERATE, STATIC, FREE, FREE_ADAPTIVE, FREE_LOSSLESS, FREE_SHORTLIST, CALM)
