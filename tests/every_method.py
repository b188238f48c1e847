"""Decode real sentences with every method; as a program, for the checkpoints on its command line."""

from __future__ import annotations

import json
import sys
from typing import Any

from models import (
    Calm,
    DecodeStats,
    FixedThreshold,
    Free,
    FullDepth,
    LoadedModel,
    MetaClassifier,
    SoftmaxGap,
    StaticExit,
    early_exit_decode,
    load_model,
)

SENTENCES = ["Werkzeug zur Verwaltung von Paketen", "Bibliothek", "Dokumentation für das Paket"]


def decode_with_every_method(loaded: LoadedModel) -> dict[str, Any]:
    """Tokens, exit layers and confidences of each method."""
    head = getattr(loaded.model, "cm_head", None)
    measure = SoftmaxGap() if head is None else MetaClassifier(head)
    sometimes = FixedThreshold(0.02 if head is None else 0.5)
    policies = {
        "full": FullDepth(),
        "static": StaticExit(2),
        "calm": Calm(measure, sometimes),
        "free": Free(2, measure, sometimes),
        "lossless": Free(2, measure, sometimes, lossless=True),
    }
    inputs = loaded.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    results = {}
    for name, policy in policies.items():
        stats = DecodeStats()
        options = {"custom_generate": early_exit_decode, "exit_policy": policy, "decode_stats": stats}
        tokens = loaded.model.generate(**inputs, **options, max_new_tokens=11, do_sample=False)
        results[name] = [tokens.tolist(), stats.exit_layers, stats.confidences]
    return results


if __name__ == "__main__":
    print(json.dumps({folder: decode_with_every_method(load_model(folder)) for folder in sys.argv[1:]}))
