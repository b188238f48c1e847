"""The names of decoding methods in tables and result files."""

from __future__ import annotations

BASELINE = "Full depth"
HF_GENERATE = "HF generate"
SWEPT = (HF_GENERATE, "Static", "FREE", "FREE adaptive", "FREE lossless", "FREE shortlist", "CALM")
