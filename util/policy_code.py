"""The policy of an evaluation as an expression: for the Python block of a model card."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from models.choices import ALL_LAYER_LOSSES
from models.exit_heads import ExitConfig
from util.exit_arguments import ExitArguments

NAMES = (  # those of `models` that expressions may use
    "AdaptiveThreshold",
    "AutoExit",
    "Calm",
    "DecayingThreshold",
    "Free",
    "FullDepth",
    "MetaClassifier",
    "PromptLookup",
    "SoftmaxGap",
    "StaticExit",
)
EXIT_FLAGS = {spec.name for spec in fields(ExitArguments) if spec.init and not spec.metadata["file"]}
FROM_FILES = ("conf_shortlist", "adapt_threshold_file")
NEEDS_A_FILE = """\
The last evaluation decoded with `--{flag}`, a file that is not part of this model: the block above decodes at
full depth."""
LEARNS = """\
The policy learns {what} from what it decodes: it begins as the last evaluation began, and its first outputs
may differ from that evaluation's later ones."""


def exit_flags_of(results: dict[str, Any]) -> dict[str, Any]:
    """The flags of exits that a result was decoded with, those with their defaults left out."""
    return {name: value for name, value in results["arguments"].items() if name in EXIT_FLAGS}


def evaluated_policy(results: dict[str, Any]) -> tuple[str, str]:
    """The expression for the policy that a result was decoded with, empty for full depth; and a sentence on
    where a block with it decodes differently, empty if nowhere."""
    arguments = results["arguments"]
    for flag in FROM_FILES:
        if arguments.get(flag):
            return "", NEEDS_A_FILE.format(flag=flag)
    flags = ExitArguments(**exit_flags_of(results))
    learnt = {"its threshold": flags.use_adapt_threshold, "its settings": flags.auto_exit}
    sentence = next((LEARNS.format(what=what) for what, given in learnt.items() if given), "")
    return policy_call(flags, arguments["max_length"]), sentence


def trained_policy(exits: ExitConfig) -> str:
    """The expression for what a checkpoint was trained for; empty for full depth."""
    measure = measure_call("meta" if exits.train_meta_cm_head else "softmax")
    if exits.shallow_exit_layer is not None:
        return f"Free({exits.shallow_exit_layer}, {measure}, 0.9)"
    return f"Calm({measure}, 0.9)" if exits.intermediate_loss_fn in ALL_LAYER_LOSSES else ""


def policy_call(flags: ExitArguments, max_length: int) -> str:
    """The expression for what `util.policies.build_policy` makes of the same; empty for full depth."""
    if flags.static_exit_layer is not None:
        return f"StaticExit({flags.static_exit_layer})"
    if flags.use_early_exit:
        return calm_call(flags, max_length)
    if flags.use_shallow_deep:
        return free_call(flags)
    return "" if flags.lookup_tokens is None else f"FullDepth({lookup_call(flags.lookup_tokens)})"


def calm_call(flags: ExitArguments, max_length: int) -> str:
    threshold = repr(flags.exit_conf_threshold)
    if flags.exit_position_temp is not None:
        form = flags.exit_decay_form
        threshold = f"DecayingThreshold({threshold}, {flags.exit_position_temp}, {max_length}, {form!r})"
    options = {"min_layer": flags.exit_min_layer, "exit_layers": flags.exit_layers}
    return call("Calm", [measure_call(flags.exit_conf_type), threshold], options)


def free_call(flags: ExitArguments) -> str:
    layer, measure = flags.shallow_exit_layer, measure_call(flags.shallow2deep_conf_type)
    if flags.auto_exit:
        return call("AutoExit", [f"[{layer}]", measure], {"lossless": flags.lossless})
    threshold = repr(flags.shallow2deep_conf_threshold)
    if flags.use_adapt_threshold:
        threshold = f"AdaptiveThreshold({threshold}, {flags.adapt_zeta})"
    options = {
        "copy_skipped": True if flags.copy_skipped_hidden_states else None,
        "rollback_threshold": flags.rollback_conf_threshold,
        "causal_catch_up": None if flags.parallel_causal_mask else False,
        "lossless": True if flags.lossless else None,
        "max_pending": flags.max_pending_tokens,
        "lookup": lookup_call(flags.lookup_tokens),
    }
    return call("Free", [str(layer), measure, threshold], options)


class Expression(str):
    """Code, whose `repr` is the code itself."""

    __repr__ = str.__str__


def lookup_call(tokens: int | None) -> Expression | None:
    return None if tokens is None else Expression(f"PromptLookup({tokens})")


def call(name: str, values: list[str], options: dict[str, Any]) -> str:
    """A call with those options that are not None."""
    given = [f"{option}={value!r}" for option, value in options.items() if value is not None]
    return f"{name}({', '.join([*values, *given])})"


def measure_call(kind: str) -> str:
    return {"softmax": "SoftmaxGap()", "meta": "MetaClassifier(loaded.model.cm_head)"}[kind]
