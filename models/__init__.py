"""The engine: models seen layer by layer, exit policies, the decoding loop, losses and loading."""

from models.bart import BartView
from models.confidence import ConfidenceMeasure, Measured, MetaClassifier, ShortlistGap, SoftmaxGap
from models.decoder_view import DecoderView, register_view, view_for
from models.decoding import DecodeStats, early_exit_decode
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.exit_policy import Calm, ExitPolicy, Free, FullDepth, SequencePolicy, StaticExit, StepResult
from models.loading import LoadedModel, create_model, load_model
from models.losses import build_exit_loss
from models.t5 import T5View
from models.threshold import AdaptiveThreshold, DecayingThreshold, FixedThreshold
from models.trace import LayerTrace, trace_layers
from models.umt5 import UMT5View

__all__ = [
    "AdaptiveThreshold",
    "BartView",
    "Calm",
    "ConfidenceMeasure",
    "DecayingThreshold",
    "DecodeStats",
    "DecoderView",
    "ExitConfig",
    "ExitPolicy",
    "FixedThreshold",
    "Free",
    "FullDepth",
    "LayerTrace",
    "LoadedModel",
    "Measured",
    "MetaClassifier",
    "SequencePolicy",
    "ShortlistGap",
    "SoftmaxGap",
    "StaticExit",
    "StepResult",
    "T5View",
    "UMT5View",
    "UserError",
    "build_exit_loss",
    "create_model",
    "early_exit_decode",
    "load_model",
    "register_view",
    "trace_layers",
    "view_for",
]
