"""Cut a model after one of its decoder layers: an ordinary, shallower one, whose tokens are Static-Exiting's.

python scripts/export_static.py --model_name_or_path checkpoints/debian-t5-free --output_dir save/two-layers

What `StaticExit(layer)` decodes, in a folder that plain transformers loads, and that needs nothing of exitlm.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import StaticArguments

if __name__ == "__main__":
    answer_help((StaticArguments,), __doc__)  # before torch is imported

import torch
from torch import nn
from transformers import PreTrainedModel

from models.decoder_view import DecoderView
from models.errors import UserError
from models.exit_adapter import NAME as ADAPTER
from models.exit_adapter import ExitAdapter
from models.exit_heads import HEAD_NAMES
from models.loading import LoadedModel, cast_model, load_model
from util.console import command
from util.files import locked_output_dir
from util.flags import parse_groups, require

COUNTS = ("num_decoder_layers", "decoder_layers")  # how families with an encoder name the decoder's depth
PER_LAYER = ("layer_types", "no_rope_layers")  # settings with an entry for each layer


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((StaticArguments,), __doc__, argv)
        with locked_output_dir(flags.output_dir):
            export(flags)


def export(flags: StaticArguments) -> None:
    """Write the model with `layer` decoder layers, and its tokenizer."""
    loaded = load_model(flags.model_name_or_path, exit_adapter=flags.exit_adapter_path)
    layer = flags.layer or loaded.exit_config.shallow_exit_layer
    require(layer is not None, "Give --layer: the checkpoint was not trained with a single exit.")
    before = count_weights(loaded.model)
    num_layers = loaded.view.num_layers
    cut_after(loaded, layer)
    cast_model(loaded.model, getattr(torch, flags.dtype)).save_pretrained(flags.output_dir)
    loaded.tokenizer.save_pretrained(flags.output_dir)
    print(
        f"Wrote {flags.output_dir}: {layer} of {num_layers} decoder layers, "
        f"{count_weights(loaded.model) / 1e6:.1f}M of {before / 1e6:.1f}M parameters."
    )


def count_weights(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


def cut_after(loaded: LoadedModel, layer: int) -> None:
    """Take from the model, in place, all decoder layers after `layer` and everything that only exits need.

    Raises:
        UserError: no such layer, an exit that says more than final norm and LM head can, or a family whose
            configuration does not count its layers by a known name.
    """
    view, model = loaded.view, loaded.model
    if not 1 <= layer < view.num_layers:
        raise UserError(f"--layer must lie in 1..{view.num_layers - 1}, got {layer}.")
    if view.exit_adapter is not None:
        take_over_norm(view, view.exit_adapter, layer)
    elif str(layer) in getattr(model, "per_exit_heads", {}):
        raise UserError(
            f"The exit after layer {layer} has a head of its own (--per_exit_head), for which "
            f"{model.config.model_type} has no place: decode with --static_exit_layer {layer} instead."
        )
    shorten_config(model, view.num_layers, layer)
    shorten_stack(view, layer)
    for name in (*HEAD_NAMES, ADAPTER):
        if hasattr(model, name):
            delattr(model, name)


def take_over_norm(view: DecoderView, adapter: ExitAdapter, layer: int) -> None:
    """Make the exit adapter's norm the final one; UserError if there is more to the adapter."""
    if adapter.kind != "norm" or adapter.shortlist is not None:
        what = "a shortlist" if adapter.kind == "norm" else f"the kind {adapter.kind}"
        raise UserError(
            f"--exit_adapter_path: an adapter with {what} has no place in {view.model.config.model_type}: "
            "only one of the kind norm, without a shortlist, can be cut out."
        )
    if adapter.layer != layer:
        raise UserError(f"--layer {layer}: the exit adapter stands after {adapter.layer}.")
    view.final_norm.load_state_dict(adapter.norm.state_dict())


def shorten_config(model: PreTrainedModel, num_layers: int, layer: int) -> None:
    """Let the configuration speak of `layer` decoder layers."""
    config = model.config
    names = COUNTS if config.is_encoder_decoder else ("num_hidden_layers",)
    count = next((name for name in names if getattr(config, name, None) == num_layers), None)
    if count is None:
        raise UserError(
            f"{config.model_type} cannot be cut: its configuration names {num_layers} decoder layers under "
            f"none of {', '.join(names)}."
        )
    for name in PER_LAYER:
        entries = getattr(config, name, None)
        if entries is not None:
            setattr(config, name, entries[:layer])
    setattr(config, count, layer)


def shorten_stack(view: DecoderView, layer: int) -> None:
    """Drop the modules of the layers after `layer`."""
    first = view.layers[0]
    for parent in view.decoder.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and child[0] is first:
                setattr(parent, name, child[:layer])
                return
    raise UserError(f"{view.model.config.model_type} cannot be cut: its layers lie in no list.")


if __name__ == "__main__":
    main()
