"""The engine: models seen layer by layer, exit policies, the decoding loop, losses and loading.

What is named here is imported when it is first used, so that `models.errors` and flags cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # ruff: noqa: F401
    from models.auto_exit import AutoExit
    from models.backends import prepare
    from models.confidence import ConfidenceMeasure, Measured, MetaClassifier, ShortlistGap, SoftmaxGap
    from models.decode_stats import DecodeStats
    from models.decoder_view import DecoderState, DecoderView
    from models.decoding import early_exit_decode
    from models.errors import UserError
    from models.exit_adapter import ExitAdapter, attach_exit_adapter, make_exit_adapter
    from models.exit_adapter_files import load_exit_adapter, save_exit_adapter
    from models.exit_heads import ExitConfig
    from models.exit_policy import Calm, ExitPolicy, FullDepth, SequencePolicy, StaticExit, StepResult
    from models.families import (
        BartView,
        GPT2View,
        GPTNeoXView,
        LlamaView,
        OPTView,
        T5View,
        UMT5View,
        register_view,
        view_for,
    )
    from models.free import Free
    from models.generation import generate
    from models.loading import LoadedModel, create_model, load_model
    from models.losses import build_exit_loss
    from models.prompt_lookup import PromptLookup
    from models.threshold import AdaptiveThreshold, DecayingThreshold, FixedThreshold
    from models.trace import LayerTrace, trace_layers

HOMES = {  # of the names above, once more for run time
    "models.auto_exit": ("AutoExit",),
    "models.backends": ("prepare",),
    "models.confidence": ("ConfidenceMeasure", "Measured", "MetaClassifier", "ShortlistGap", "SoftmaxGap"),
    "models.decoder_view": ("DecoderState", "DecoderView"),
    "models.decode_stats": ("DecodeStats",),
    "models.decoding": ("early_exit_decode",),
    "models.errors": ("UserError",),
    "models.exit_adapter": ("ExitAdapter", "attach_exit_adapter", "make_exit_adapter"),
    "models.exit_adapter_files": ("load_exit_adapter", "save_exit_adapter"),
    "models.exit_heads": ("ExitConfig",),
    "models.exit_policy": ("Calm", "ExitPolicy", "FullDepth", "SequencePolicy", "StaticExit", "StepResult"),
    "models.families": (
        "BartView",
        "GPT2View",
        "GPTNeoXView",
        "LlamaView",
        "OPTView",
        "T5View",
        "UMT5View",
        "register_view",
        "view_for",
    ),
    "models.free": ("Free",),
    "models.generation": ("generate",),
    "models.loading": ("LoadedModel", "create_model", "load_model"),
    "models.losses": ("build_exit_loss",),
    "models.prompt_lookup": ("PromptLookup",),
    "models.threshold": ("AdaptiveThreshold", "DecayingThreshold", "FixedThreshold"),
    "models.trace": ("LayerTrace", "trace_layers"),
}
__all__ = sorted(name for names in HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    home = next((module for module, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
