"""Tiny models on ONNX Runtime, and the policies that decode with them."""

from __future__ import annotations

import os

import torch
from decoding_cases import LENGTH, EveryThirdDeep
from pairs import slow_but, thin
from tiny_models import FAMILIES, tiny_model

from models import (
    AdaptiveThreshold,
    Calm,
    ExitConfig,
    FixedThreshold,
    Free,
    FullDepth,
    LoadedModel,
    SoftmaxGap,
    StaticExit,
)

# LOSSLESS_EXAMPLES=5000 pytest tests/test_onnx_bits.py -k lossless  decodes as many sequences.
MAX_EXAMPLES = int(os.environ.get("LOSSLESS_EXAMPLES", 40))
WINDOWED = 36  # of each row whose bits are compared
DAILY = ("t5-tied",)
EACH_FAMILY = slow_but(DAILY, FAMILIES)
EACH_KIND = slow_but(DAILY, thin(FAMILIES, ["t5-tied", "umt5", "bart-tied"]))  # of biases of positions


def check_bits_in_windows(states_of):
    """What `states_of(windows, rows)` tells of 3 rows, in windows that hold WINDOWED, is for every row what
    it is alone, a token at a time."""
    alone = [states_of([1] * WINDOWED, slice(row, row + 1)) for row in range(3)]
    for windows in ([WINDOWED], [2] * 18, [3] * 12, [4, 8, 6, 9, 9], [1, 5, 1, 11, 17, 1], [17, 19], [33, 3]):
        for ours, *theirs in zip(states_of(windows, slice(None)), *alone, strict=True):
            assert torch.equal(ours, torch.cat(theirs)), windows


def loaded(model):
    return LoadedModel(model, None, ExitConfig())


def perturbed(family, seed=0):
    """A tiny model whose norms and biases differ from each other."""
    model = tiny_model(family, seed=seed)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    return model


def policies():
    gap, third = SoftmaxGap(), EveryThirdDeep()
    return {
        "full": FullDepth(),
        "static": StaticExit(3),
        "calm": Calm(gap, FixedThreshold(0.1)),
        "calm at layers": Calm(gap, FixedThreshold(0.1), exit_layers=[2, 5]),
        "free": Free(2, gap, third),
        "free copying": Free(2, gap, third, copy_skipped=True),
        "adaptive": Free(2, gap, AdaptiveThreshold(0.1)),
        "lossless": Free(2, gap, third, lossless=True),
        "lossless in short windows": Free(2, gap, FixedThreshold(-1.0), lossless=True, max_pending=2),
    }


def decode(model, inputs, policy, stats=None, **options):
    options = {"max_length": LENGTH, "do_sample": False} | options
    return model.generate(**inputs, exit_policy=policy, decode_stats=stats, **options)
