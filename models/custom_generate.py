"""`generate` with early exits by keywords alone: what a `custom_generate` repository serves.

    model.generate(**inputs, custom_generate="org/free-decoding", trust_remote_code=True, shallow_layer=2)

`scripts/export_custom_generate.py` makes such a repository of this module and all that it imports.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from models.checks import spell
from models.confidence import ConfidenceMeasure, MetaClassifier, SoftmaxGap
from models.decode_stats import DecodeStats
from models.decoding import early_exit_decode
from models.errors import UserError
from models.exit_adapter import ExitAdapter, attach_exit_adapter, exit_adapter_of
from models.exit_adapter_files import load_exit_adapter, twin_of
from models.exit_heads import ExitConfig, exit_head_weights, head_misfits, load_exit_heads
from models.exit_policy import Calm, ExitPolicy, FullDepth, StaticExit
from models.free import Free
from models.generate_contract import Output, with_stop_strings
from models.prompt_lookup import PromptLookup
from models.stored_heads import attach_stored_heads, load_exit_config, read_extra_weights, read_head_names

READ_BY = {  # the options of each method
    "free": {
        "shallow_layer",
        "threshold",
        "confidence",
        "lossless",
        "max_pending_tokens",
        "lookup_tokens",
        "copy_skipped",
        "rollback_threshold",
        "exit_adapter",
    },
    "calm": {"threshold", "confidence", "min_layer", "exit_layers"},
    "static": {"shallow_layer", "exit_adapter"},
    "full": {"lookup_tokens"},
}
CONFIDENCES = ("softmax", "meta")
TOOLKIT_ONLY = (  # what the toolkit offers besides
    "exit_policy",
    "decoder_view",
    "backend",
    "precision",
    "exit_precision",
    "auto_exit",
    "use_adapt_threshold",
    "calibrated_threshold_file",
    "conf_shortlist",
)
PARAMETERS = frozenset(inspect.signature(GenerationMixin.generate).parameters)
EXITS, ADAPTERS = "_exits_of_checkpoint", "_exit_adapters"  # kept on the model between calls


@dataclass
class ExitOptions:
    """The keywords, and their values where they are left out; layers count from 1.

    Raises:
        UserError: no such method or confidence.
    """

    method: str = "free"
    shallow_layer: int | None = None  # default: the exit adapter's, or the one that the checkpoint names
    threshold: float = 0.9
    confidence: str = "softmax"
    lossless: bool = False
    max_pending_tokens: int | None = None
    lookup_tokens: int | None = None
    copy_skipped: bool = False
    rollback_threshold: float | None = None
    min_layer: int = 1
    exit_layers: list[int] | None = None
    exit_adapter: str | None = None  # folder or repository

    def __post_init__(self) -> None:
        for name, allowed in (("method", tuple(READ_BY)), ("confidence", CONFIDENCES)):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")

    def refuse_unread(self, given: Iterable[str]) -> None:
        """Raise UserError for the first of the given names that the method does not read."""
        for name in given:
            if name != "method" and name not in READ_BY[self.method]:
                raise UserError(f"method={self.method!r} does not read {name}: leave it out.")


OPTIONS = tuple(spec.name for spec in fields(ExitOptions))


def generate(
    inputs: Tensor | None = None,
    *,
    model: PreTrainedModel,
    decode_stats: dict[str, Any] | None = None,
    **options: Any,
) -> Output:
    """As the model's own `generate`, each token as deep as the method decides: (B, P + T) ids, or the usual
    output object.

    Args:
        decode_stats: gets tokens, exit_share, average_layers, ideal_speedup and exit_layers, [row][token].
        options: those of `ExitOptions`, and what `generate` takes.

    Raises:
        UserError: an option that is not served, or does not fit the model or the other options.
    """
    refuse_not_served(model, options)
    if decode_stats is not None and not isinstance(decode_stats, dict):
        raise UserError(f"decode_stats must be a dict to fill, got {spell(decode_stats)}.")
    given = {name: value for name in OPTIONS if (value := options.pop(name, None)) is not None}
    exits = ExitOptions(**given)
    exits.refuse_unread(given)
    with torch.random.fork_rng(devices=[]):  # new modules draw weights, of which sampling should know nothing
        trained = exits_of(model)
        if exits.exit_adapter is not None:
            model = twin_with(model, exits.exit_adapter)
    stops = [options.pop(name, None) for name in ("stopping_criteria", "stop_strings", "tokenizer")]
    stats, lookup_ids = DecodeStats(), options.pop("lookup_ids", None)
    if lookup_ids is None and exits.lookup_tokens is not None:
        lookup_ids = source_of(model, inputs, options)
    output = GenerationMixin.generate(  # not the model's, which may be this function
        model,
        inputs,
        custom_generate=early_exit_decode,
        exit_policy=build_policy(exits, trained, model),
        decode_stats=stats,
        lookup_ids=lookup_ids,
        stopping_criteria=with_stop_strings(*stops),
        **options,
    )
    if decode_stats is not None:
        names = ("tokens", "exit_share", "average_layers", "ideal_speedup", "exit_layers")
        decode_stats.update({name: getattr(stats, name) for name in names})
    return output


def source_of(model: PreTrainedModel, inputs: Tensor | None, options: dict[str, Any]) -> Tensor | None:
    """What an encoder reads as ids (B, S), for lookups; None without an encoder."""
    if not model.config.is_encoder_decoder:
        return None
    return options.get("input_ids") if inputs is None else inputs


def refuse_not_served(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Raise UserError for what the toolkit alone can do, and for misspelt options; others that are unknown
    `generate` refuses itself."""
    for name in options:
        if name in OPTIONS or name in PARAMETERS or hasattr(model.generation_config, name):
            continue
        if name in TOOLKIT_ONLY:
            raise UserError(f"custom_generate does not serve {name}: only the toolkit itself does.")
        near = get_close_matches(name, OPTIONS, 1, 0.75)
        if near:
            raise UserError(f"custom_generate has no option {name}: did you mean {near[0]}?")


def exits_of(model: PreTrainedModel) -> ExitConfig:
    """What the model's checkpoint says of exits; the heads that it names are loaded with the first call."""
    known = vars(model).get(EXITS)
    if known is None:
        known = read_exits(model)
        setattr(model, EXITS, known)
    return known


def read_exits(model: PreTrainedModel) -> ExitConfig:
    """Attach the exit heads that the files of the model's checkpoint hold; its exit configuration."""
    name, commit = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:  # made of a config
        return ExitConfig()
    hub = {} if commit is None else {"revision": commit}
    before = set(exit_head_weights(model.state_dict()))
    exits = attach_stored_heads(model, load_exit_config(name, **hub), read_head_names(name, **hub))
    if set(exit_head_weights(model.state_dict())) == before:  # has none, or its own already
        return exits
    weights = exit_head_weights(read_extra_weights(name, **hub))
    misfits = {kind: names for kind, names in head_misfits(model, weights).items() if names}
    if misfits:
        raise UserError(f"The exit heads of {name} do not fit its exit configuration: {misfits}.")
    load_exit_heads(model, weights)
    return exits


def twin_with(model: PreTrainedModel, exit_adapter: str) -> PreTrainedModel:
    """The model, as it is now, with an exit adapter, which is loaded once; the model itself lacks it."""
    loaded, twin = vars(model).setdefault(ADAPTERS, {}), twin_of(model)
    if exit_adapter not in loaded:
        loaded[exit_adapter] = load_exit_adapter(twin, exit_adapter)
    fitting = (exit_adapter, model.device, model.dtype)
    if fitting not in loaded:
        loaded[fitting] = fitted(loaded[exit_adapter], model)
    attach_exit_adapter(twin, loaded[fitting])
    return twin


def fitted(adapter: ExitAdapter, model: PreTrainedModel) -> ExitAdapter:
    """An exit adapter where the model is, and in its precision: a copy where it was loaded for another, as
    its own weights would stay rounded."""
    weight = next(adapter.parameters())
    if (weight.device, weight.dtype) == (model.device, model.dtype):
        return adapter
    return copy.deepcopy(adapter).to(model.device, model.dtype)


def build_policy(options: ExitOptions, trained: ExitConfig, model: PreTrainedModel) -> ExitPolicy:
    """The policy that the options ask for."""
    lookup = None if options.lookup_tokens is None else PromptLookup(options.lookup_tokens)
    if options.method == "full":
        return FullDepth(lookup)
    if options.method == "calm":
        measure = build_measure(options, model)
        limits = (options.min_layer, options.exit_layers)
        return Calm(measure, options.threshold, *limits)
    adapter = exit_adapter_of(model)
    layer = options.shallow_layer
    if layer is None:
        layer = trained.shallow_exit_layer if adapter is None else adapter.layer
    if layer is None:
        raise UserError("Give shallow_layer: the checkpoint does not say after which layer tokens may exit.")
    if options.method == "static":
        return StaticExit(layer)
    return Free(
        layer,
        build_measure(options, model),
        options.threshold,
        options.copy_skipped,
        options.rollback_threshold,
        lossless=options.lossless,
        max_pending=options.max_pending_tokens,
        lookup=lookup,
    )


def build_measure(options: ExitOptions, model: PreTrainedModel) -> ConfidenceMeasure:
    if options.confidence == "softmax":
        return SoftmaxGap()
    if exit_adapter_of(model) is not None:
        raise UserError("confidence='meta' reads states that the exit adapter replaces: use 'softmax'.")
    if not hasattr(model, "cm_head"):
        raise UserError("confidence='meta' needs a checkpoint with a confidence head: use 'softmax'.")
    return MetaClassifier(model.cm_head)
