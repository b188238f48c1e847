"""From flags to policy objects: the one place that knows both."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from models.auto_exit import AutoExit
from models.confidence import ConfidenceMeasure, MetaClassifier, ShortlistGap, SoftmaxGap
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.exit_policy import Calm, ExitPolicy, FullDepth, StaticExit
from models.free import Free
from models.json_files import fits, read_mapping
from models.loading import LoadedModel
from models.prompt_lookup import PromptLookup
from models.threshold import AdaptiveThreshold, DecayingThreshold, FixedThreshold, Threshold
from util.calibration.certificate import CalibratedThreshold, decoding_settings, describe_data
from util.data_arguments import DataArguments
from util.evaluation.identity import identify_model
from util.exit_arguments import ExitArguments
from util.flags import require

logger = logging.getLogger(__name__)


def resolve_exit_arguments(flags: ExitArguments, trained: ExitConfig, num_layers: int) -> ExitArguments:
    """Fill in what the checkpoint knows and check all layers against the decoder's depth.

    Raises:
        UserError: FREE without a known exit layer, or a layer outside 1..num_layers - 1.
    """
    if flags.use_shallow_deep and flags.shallow_exit_layer is None:
        if trained.shallow_exit_layer is None:
            raise UserError(
                "--use_shallow_deep needs --shallow_exit_layer: the checkpoint was not trained with one."
            )
        flags = replace(flags, shallow_exit_layer=trained.shallow_exit_layer)
    for name in ("static_exit_layer", "shallow_exit_layer", "exit_min_layer", "exit_layers"):
        value = getattr(flags, name)
        require_exits(name, value if isinstance(value, list) else [value], num_layers)
    if flags.shallow_exit_layer not in (None, trained.shallow_exit_layer) and trained.shallow_exit_layer:
        logger.warning(
            "--shallow_exit_layer %s differs from the %s that the checkpoint was trained with.",
            flags.shallow_exit_layer,
            trained.shallow_exit_layer,
        )
    return flags


def require_exits(name: str, layers: Iterable[int | None], num_layers: int) -> None:
    """Raise UserError if flag `name` holds a layer that a decoder of so many cannot exit after."""
    for layer in layers:
        require(
            layer is None or 1 <= layer < num_layers,
            f"--{name} must lie in 1..{num_layers - 1} for this {num_layers}-layer decoder, got {layer}.",
        )


def build_policy(flags: ExitArguments, loaded: LoadedModel, max_length: int) -> ExitPolicy:
    """The policy that resolved flags ask for; `max_length` is the N of CALM's decaying threshold."""
    lookup = None if flags.lookup_tokens is None else PromptLookup(flags.lookup_tokens)
    if flags.static_exit_layer is not None:
        return StaticExit(flags.static_exit_layer)
    if flags.use_early_exit:
        threshold = calm_threshold(flags, max_length)
        measure = build_measure("--exit_conf_type", flags.exit_conf_type, flags.conf_shortlist, loaded)
        return Calm(measure, threshold, flags.exit_min_layer or 1, flags.exit_layers)
    if flags.use_shallow_deep:
        return build_free(flags, loaded, lookup)
    return FullDepth(lookup)


def build_free(flags: ExitArguments, loaded: LoadedModel, lookup: PromptLookup | None) -> Free | AutoExit:
    """FREE, or what finds its settings by itself."""
    assert flags.shallow_exit_layer is not None  # as `resolve_exit_arguments` leaves it
    kind, shortlist = flags.shallow2deep_conf_type, flags.conf_shortlist
    measure = build_measure("--shallow2deep_conf_type", kind, shortlist, loaded)
    if flags.auto_exit:
        return AutoExit([flags.shallow_exit_layer], measure, flags.lossless)
    return Free(
        flags.shallow_exit_layer,
        measure,
        free_threshold(flags),
        copy_skipped=flags.copy_skipped_hidden_states,
        rollback_threshold=flags.rollback_conf_threshold,
        causal_catch_up=flags.parallel_causal_mask,
        lossless=flags.lossless,
        max_pending=flags.max_pending_tokens,
        lookup=lookup,
    )


def threshold_flag(flags: ExitArguments) -> str:
    """Name of the flag that holds the threshold of the method in use."""
    return "exit_conf_threshold" if flags.use_early_exit else "shallow2deep_conf_threshold"


def with_threshold(flags: ExitArguments, value: float) -> ExitArguments:
    """The same flags with another threshold of the method in use."""
    changed: dict[str, Any] = {threshold_flag(flags): value}
    return replace(flags, **changed)


def with_calibrated_threshold(
    flags: ExitArguments,
    data: DataArguments,
    loaded: LoadedModel,
    examples: Dataset,
    max_length: int,
    batch_size: int,
) -> ExitArguments:
    """Resolved flags with the threshold of --calibrated_threshold_file, once it is found to apply.

    Raises:
        UserError: it was calibrated for something else, or another threshold is given.
    """
    if flags.calibrated_threshold_file is None:
        return flags
    path = Path(flags.calibrated_threshold_file)
    calibrated = CalibratedThreshold.load(path)
    decoding = decoding_settings(flags, data, loaded, max_length, batch_size)
    value = calibrated.certified(path, identify_model(loaded), decoding)
    name = threshold_flag(flags)
    given = getattr(flags, name)
    if given not in (value, getattr(ExitArguments, name)):
        raise UserError(
            f"--{name} {given} contradicts --calibrated_threshold_file {path}, which says {value}."
        )
    calibrated.warn_of_data(path, describe_data(examples, data))
    return with_threshold(flags, value)


def free_threshold(flags: ExitArguments) -> Threshold:
    if not flags.use_adapt_threshold:
        return FixedThreshold(flags.shallow2deep_conf_threshold)
    if flags.adapt_threshold_file is not None:
        return saved_threshold(flags, flags.adapt_threshold_file)
    return AdaptiveThreshold(flags.shallow2deep_conf_threshold, flags.adapt_zeta)


def saved_threshold(flags: ExitArguments, path: str) -> AdaptiveThreshold:
    """The threshold that an earlier evaluation left.

    Raises:
        UserError: the file is none of them, or was begun with other settings than are given.
    """
    try:
        threshold = AdaptiveThreshold.load(path)
    except ValueError as error:  # a file that is damaged, or settings that no threshold takes
        raise UserError(f"--adapt_threshold_file: {error}") from error
    begun_with = {"adapt_zeta": threshold.zeta, "shallow2deep_conf_threshold": threshold.initial}
    for name, value in begun_with.items():
        given = getattr(flags, name)
        require(
            given in (value, getattr(ExitArguments, name)),
            f"--{name} {given} contradicts --adapt_threshold_file {path}, which was begun with {value}: "
            f"leave --{name} out.",
        )
    return threshold


def calm_threshold(flags: ExitArguments, max_length: int) -> Threshold:
    if flags.exit_position_temp is None:
        return FixedThreshold(flags.exit_conf_threshold)
    return DecayingThreshold(
        flags.exit_conf_threshold, flags.exit_position_temp, max_length, flags.exit_decay_form
    )


def build_measure(flag: str, name: str, shortlist: str | None, loaded: LoadedModel) -> ConfidenceMeasure:
    if shortlist is not None:
        return ShortlistGap(loaded.view, read_shortlist(Path(shortlist)))
    if name == "softmax":
        return SoftmaxGap()
    if loaded.view.exit_adapter is not None:
        raise UserError(f"{flag} meta reads states that the exit adapter replaces: use softmax.")
    if not hasattr(loaded.model, "cm_head"):
        raise UserError(f"{flag} meta needs a checkpoint with a confidence head: see --train_meta_cm_head.")
    return MetaClassifier(loaded.model.cm_head)


def read_shortlist(path: Path) -> Tensor:
    """Token ids (K,) that scripts/learn_shortlist.py wrote.

    Raises:
        UserError: the file holds something else.
    """
    content = read_mapping(path, "--conf_shortlist")
    if not fits(content.get("token_ids"), list[int]) or not content["token_ids"]:
        raise UserError(f"--conf_shortlist {path} is not what scripts/learn_shortlist.py writes.")
    return torch.tensor(content["token_ids"], dtype=torch.long)
