"""The engine: models seen layer by layer, exit policies, the decoding loop, losses and loading.

Names are loaded when they are first used, so that `import models.errors` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

EXPORTS = {
    "confidence": ("ConfidenceMeasure", "Measured", "MetaClassifier", "ShortlistGap", "SoftmaxGap"),
    "decoder_view": ("DecoderState", "DecoderView"),
    "decoding": ("DecodeStats", "early_exit_decode", "generate"),
    "errors": ("UserError",),
    "exit_heads": ("ExitConfig",),
    "exit_policy": ("Calm", "ExitPolicy", "FullDepth", "SequencePolicy", "StaticExit", "StepResult"),
    "families": ("BartView", "T5View", "UMT5View", "register_view", "view_for"),
    "free": ("Free",),
    "loading": ("LoadedModel", "create_model", "load_model"),
    "losses": ("build_exit_loss",),
    "threshold": ("AdaptiveThreshold", "DecayingThreshold", "FixedThreshold"),
    "trace": ("LayerTrace", "trace_layers"),
}
HOMES = {name: module for module, names in EXPORTS.items() for name in names}
__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
