"""From flags to policy objects: the one place that knows both."""

from __future__ import annotations

import logging
from dataclasses import replace

from models.confidence import ConfidenceMeasure, MetaClassifier, SoftmaxGap
from models.errors import UserError
from models.exit_heads import ExitConfig
from models.exit_policy import Calm, ExitPolicy, Free, FullDepth, StaticExit
from models.loading import LoadedModel
from models.threshold import AdaptiveThreshold, DecayingThreshold, FixedThreshold, Threshold
from util.arguments import ExitArguments

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
    elif flags.shallow_exit_layer not in (None, trained.shallow_exit_layer) and trained.shallow_exit_layer:
        logger.warning(
            "--shallow_exit_layer %s differs from the %s that the checkpoint was trained with.",
            flags.shallow_exit_layer,
            trained.shallow_exit_layer,
        )
    for name in ("static_exit_layer", "shallow_exit_layer", "exit_min_layer"):
        layer = getattr(flags, name)
        if layer is not None and not 1 <= layer < num_layers:
            raise UserError(
                f"--{name} must lie in 1..{num_layers - 1} for this {num_layers}-layer decoder, got {layer}."
            )
    return flags


def build_policy(flags: ExitArguments, loaded: LoadedModel, max_length: int) -> ExitPolicy:
    """The policy that resolved flags ask for; `max_length` is the N of CALM's decaying threshold."""
    if flags.static_exit_layer is not None:
        return StaticExit(flags.static_exit_layer)
    if flags.use_early_exit:
        threshold = calm_threshold(flags, max_length)
        measure = build_measure("--exit_conf_type", flags.exit_conf_type, loaded)
        return Calm(measure, threshold, flags.exit_min_layer or 1)
    if flags.use_shallow_deep:
        return Free(
            flags.shallow_exit_layer,
            build_measure("--shallow2deep_conf_type", flags.shallow2deep_conf_type, loaded),
            free_threshold(flags),
            flags.copy_skipped_hidden_states,
            flags.rollback_conf_threshold,
            flags.parallel_causal_mask,
            flags.lossless,
            flags.max_pending_tokens,
        )
    return FullDepth()


def free_threshold(flags: ExitArguments) -> Threshold:
    if not flags.use_adapt_threshold:
        return FixedThreshold(flags.shallow2deep_conf_threshold)
    if flags.adapt_threshold_file is not None:
        return AdaptiveThreshold.load(flags.adapt_threshold_file)
    return AdaptiveThreshold(flags.shallow2deep_conf_threshold, flags.adapt_zeta)


def calm_threshold(flags: ExitArguments, max_length: int) -> Threshold:
    if flags.exit_position_temp is None:
        return FixedThreshold(flags.exit_conf_threshold)
    return DecayingThreshold(
        flags.exit_conf_threshold, flags.exit_position_temp, max_length, flags.exit_decay_form
    )


def build_measure(flag: str, name: str, loaded: LoadedModel) -> ConfidenceMeasure:
    if name == "softmax":
        return SoftmaxGap()
    if not hasattr(loaded.model, "cm_head"):
        raise UserError(f"{flag} meta needs a checkpoint with a confidence head: see --train_meta_cm_head.")
    return MetaClassifier(loaded.model.cm_head)
