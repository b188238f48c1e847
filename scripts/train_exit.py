"""Give a frozen model an exit: teach a small part behind a shallow layer to say what the last layer says.

    python scripts/train_exit.py --model_name_or_path MODEL --train_file prompts.jsonl --source_column text \
        --task summarization --precision w8 --output_dir save/exit

The model answers the prompts itself, and its exit learns from its own distributions; the model's weights
stay as they are, so that lossless decoding returns exactly its outputs. Data flags are those of run.py. A run
that was killed goes on by the same command. Under torchrun, processes share the work.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.backend_arguments import BackendArguments
from util.data_arguments import DataArguments
from util.exit_training.flags import ExitTrainingArguments
from util.flag_help import answer_help

if __name__ == "__main__":
    answer_help((ExitTrainingArguments, DataArguments, BackendArguments), __doc__)  # before torch is imported

import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from models.choices import KEEPING_EXIT_ADAPTERS
from models.errors import UserError
from models.exit_adapter import attach_exit_adapter, check_kv_layer, make_exit_adapter
from models.exit_adapter_files import load_exit_adapter, read_exit_config, save_exit_adapter
from models.families import view_for
from models.families.causal import CausalView
from models.families.encoder_decoder import EncoderDecoderView
from models.json_files import read_mapping
from models.loading import LoadedModel, cast_model
from util.backend import limit_threads, run_by_backend
from util.console import command
from util.data.encoding import Encoder, encoder_for
from util.data_arguments import refuse_flags_of_run, require_split
from util.device import best_device
from util.environment import environment
from util.evaluation.identity import hash_rows, identify_model, total
from util.exit_training.card import write_exit_card
from util.exit_training.forecast import ExitCosts, Forecast, best, measure_costs, read_costs
from util.exit_training.objectives import LayeredView
from util.exit_training.states import FreshStates, Start, States, compute_states
from util.exit_training.teaching import Teaching, adapter_of
from util.exit_training.texts import Text, answer_prompts, given_targets, group_alike
from util.files import content_hash, locked_output_dir, write_json
from util.flags import parse_groups, require
from util.policies import require_exits
from util.progress import is_first_process
from util.setup import open_checkpoint, read_split
from util.tables import comparison_table, print_report

TIMED_ROWS = 3  # whose prompts forecasts are made with
COLUMNS = {
    "layer": "layer",
    "decoding": "decoding",
    "threshold": "threshold",
    "max_pending": "cap",
    "exit_share": "exits",
    "agreement": "right",
    "unchanged": "unchanged",
    "speedup": "speed-up",
}


def main(argv: list[str] | None = None) -> None:
    with command("Run the same command: it goes on from where it was."):
        groups = (ExitTrainingArguments, DataArguments, BackendArguments)
        flags, data, backend = parse_groups(groups, __doc__, argv)
        refuse_flags_of_run(
            data,
            reads=["max_train_samples"],
            limits="use --max_train_samples",
            resume_eval="this goes on by itself; leave it out",
        )
        with locked_output_dir(Path(flags.output_dir)):
            data.report_dir = flags.output_dir if is_first_process() else None
            teach(flags, data, backend)


def teach(flags: ExitTrainingArguments, data: DataArguments, backend: BackendArguments) -> None:
    data.sources_alone = flags.self_generated
    require_split(data, flags.split)
    limit_threads(backend)
    PartialState(cpu=best_device().type == "cpu")  # else processes on CPUs would not know of each other
    torch.manual_seed(flags.seed)
    loaded = open_checkpoint(flags.model_name_or_path, data)
    loaded.model.requires_grad_(False)
    layers = candidate_layers(flags, loaded)
    kv_layer = choose_kv_layer(flags, loaded, layers)
    all_examples = read_split(data, flags.split, loaded, data.max_train_samples)
    examples = own_share(all_examples)
    require(
        len(examples) > flags.held_out,
        f"--held_out {flags.held_out}: there are only {len(examples)} rows; hold out fewer.",
    )
    encoder = encoder_for(loaded, data.max_source_length, data.val_max_target_length)
    identity = identify(flags, data, loaded, all_examples, backend)
    frozen = in_bfloat16(loaded) if flags.bf16 else loaded
    texts = read_texts(flags, data, frozen, encoder, examples, backend, identity)
    has_encoder = loaded.model.config.is_encoder_decoder
    first = loaded.model.generation_config.decoder_start_token_id if has_encoder else None
    start = Start(first, with_prompt=flags.prompt_weight > 0)
    depths = layers if kv_layer is None else sorted({*layers, kv_layer - 1})
    states = read_states(flags, frozen, texts, depths, start)
    views = make_views(flags, loaded, layers, kv_layer, texts)
    costs = find_costs(flags, views, loaded, encoder, examples, backend)
    taught, held_out = range(len(texts))[: -flags.held_out], range(len(texts))[-flags.held_out :]
    identity |= identify_teaching(flags, views, kv_layer)
    teaching = Teaching(views, states, taught, held_out, costs, flags, identity)
    conclude(flags, loaded, views, costs, teaching.run())


def candidate_layers(flags: ExitTrainingArguments, loaded: LoadedModel) -> list[int]:
    if flags.exit_adapter_path is not None:
        return [read_exit_config(flags.exit_adapter_path).layer]
    depth = loaded.view.num_layers
    require(loaded.model.config.model_type is not None and depth > 1, "A model of one layer has no exit.")
    layers = sorted(set(flags.exit_layers)) or [max(1, round(depth / 3))]
    require_exits("exit_layers", layers, depth)
    if not isinstance(loaded.view, CausalView | EncoderDecoderView):
        raise UserError(f"There are no exit adapters for model family {loaded.model.config.model_type!r}.")
    return layers


def choose_kv_layer(flags: ExitTrainingArguments, loaded: LoadedModel, layers: list[int]) -> int | None:
    """The layer whose keys/values exits attend to; None for their own alone."""
    if flags.exit_adapter_path is not None:
        return read_exit_config(flags.exit_adapter_path).kv_layer
    view = cast(LayeredView, loaded.view)
    if flags.exit_kv_layer == 0:
        return None
    if flags.exit_kv_layer is not None:
        kv_layer = flags.exit_kv_layer
        check_kv_layer(view, flags.exit_adapter, max(layers), kv_layer, name="--exit_kv_layer")
        return kv_layer
    if flags.exit_adapter not in KEEPING_EXIT_ADAPTERS or not view.takes_biases:
        return None
    return max(2 * view.num_layers // 3 + 1, max(layers) + 1)


def in_bfloat16(loaded: LoadedModel) -> LoadedModel:
    """A copy that generates and reads faster; forecasts and the exit's own weights take the model itself."""
    return replace(loaded, model=cast_model(copy.deepcopy(loaded.model), torch.bfloat16))


def own_share(examples: Dataset) -> Dataset:
    """The rows of this process: every n-th, so that the last of each are among the last of all."""
    state = PartialState()
    if state.num_processes == 1:
        return examples
    return examples.shard(state.num_processes, state.process_index, contiguous=False)


def in_folder(flags: ExitTrainingArguments, name: str) -> Path:
    """A file or folder of --output_dir; each of several processes has its own."""
    state = PartialState()
    share = f".{state.process_index}-of-{state.num_processes}" if state.num_processes > 1 else ""
    path = Path(flags.output_dir, name)
    return path.with_name(f"{path.stem}{share}{path.suffix}")


def identify(
    flags: ExitTrainingArguments,
    data: DataArguments,
    loaded: LoadedModel,
    examples: Dataset,
    backend: BackendArguments,
) -> dict[str, Any]:
    """What texts, and all that follows, depend on."""
    return {
        "model": identify_model(loaded),
        "rows": hash_rows(examples),
        "lengths": [data.max_source_length, data.val_max_target_length],
        "prompt": repr(loaded.prompt),
        "--self_generated": flags.self_generated,
        "precision": generation_precision(flags, backend),
        "--shortlist_size": flags.shortlist_size,
        "--held_out": flags.held_out,
        "--generation_batch_size": flags.generation_batch_size,  # which texts are written together, in order
    }


def identify_teaching(
    flags: ExitTrainingArguments, views: dict[int, LayeredView], kv_layer: int | None
) -> dict[str, Any]:
    """What is taught, from which weights on, and how weights follow. For how long may change, unless it is
    planned."""
    return {
        "weights of --exit_adapter_path": None if flags.exit_adapter_path is None else hash_exits(views),
        "exit_adapter": flags.exit_adapter,
        "exit_layers": list(views),
        "--exit_kv_layer": kv_layer,
        "loss": flags.exit_loss,
        "--learning_rate": flags.learning_rate,
        "--lr_schedule": flags.lr_schedule,
        "--max_steps": flags.max_steps if flags.lr_schedule == "cosine" else None,
        "--batch_tokens": flags.batch_tokens,
        "--prompt_weight": flags.prompt_weight,
        "--seed": flags.seed,
    }


def hash_exits(views: dict[int, LayeredView]) -> str:
    adapters = [adapter_of(view) for view in views.values()]
    return content_hash(
        [name, total(weight)] for adapter in adapters for name, weight in adapter.state_dict().items()
    )


def read_texts(
    flags: ExitTrainingArguments,
    data: DataArguments,
    loaded: LoadedModel,
    encoder: Encoder,
    examples: Dataset,
    backend: BackendArguments,
    identity: dict[str, Any],
) -> list[Text]:
    """Step 1: the model's own outputs, or the targets."""
    path, settings = in_folder(flags, "texts.jsonl"), in_folder(flags, "texts.settings.json")
    if settings.exists() or path.exists():
        before = read_mapping(settings)
        changed = sorted(name for name in identity if before.get(name) != identity[name])
        require(
            not changed,
            f"--output_dir {flags.output_dir} was begun with other {', '.join(changed)}: name another.",
        )
    write_json(settings, identity)
    if not flags.self_generated:
        return given_targets(encoder, examples)
    writer = loaded
    if not flags.bf16:
        own = replace(backend.without_exit(), precision=generation_precision(flags, backend))
        writer = run_by_backend(loaded, own)
    length = data.val_max_target_length
    groups = group_alike(list(examples["source"]), flags.generation_batch_size, flags.held_out)
    return answer_prompts(writer, encoder, examples, path, groups, length)


def generation_precision(flags: ExitTrainingArguments, backend: BackendArguments) -> str:
    return "bf16" if flags.bf16 else flags.generation_precision or backend.precision


def learn_shortlist(texts: list[Text], flags: ExitTrainingArguments, loaded: LoadedModel) -> Tensor | None:
    """The most frequent tokens of outputs, then of prompts; those of the first process for all."""
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    size = flags.shortlist_size
    if not size or size >= vocabulary:
        return None
    outputs = Counter(token for text in texts for token in text.output_ids)
    inputs = Counter(token for text in texts for token in text.input_ids if token < vocabulary)
    ranked = [token for token, _ in outputs.most_common()]
    ranked += [token for token, _ in inputs.most_common() if token not in outputs]
    ranked += [token for token in range(vocabulary) if token not in outputs and token not in inputs]
    chosen = [torch.tensor(sorted(ranked[:size]))]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    return chosen[0]


def make_views(
    flags: ExitTrainingArguments,
    loaded: LoadedModel,
    layers: list[int],
    kv_layer: int | None,
    texts: list[Text],
) -> dict[int, LayeredView]:
    """By candidate layer, the model seen with an adapter behind it: the given one, or an untaught one."""
    if flags.exit_adapter_path is not None:
        adapter = load_exit_adapter(loaded.model, flags.exit_adapter_path)
        return {adapter.layer: cast(LayeredView, view_for(loaded.model))}
    views, shortlist = {}, learn_shortlist(texts, flags, loaded)
    plain = view_for(loaded.model)
    for layer in layers:
        adapter = make_exit_adapter(plain, flags.exit_adapter, layer, shortlist, kv_layer)
        attach_exit_adapter(loaded.model, adapter)
        views[layer] = cast(LayeredView, view_for(loaded.model))
    return views


def read_states(
    flags: ExitTrainingArguments, frozen: LoadedModel, texts: list[Text], depths: list[int], start: Start
) -> States:
    """Step 2: what the frozen layers make of the texts, after as many layers as `depths` say."""
    on_disk = flags.cache_states if flags.cache_states is not None else frozen.model.device.type == "cpu"
    if not on_disk:
        return FreshStates(frozen.view, texts, depths, start)
    return compute_states(frozen.view, texts, depths, in_folder(flags, "states"), start)


def find_costs(
    flags: ExitTrainingArguments,
    views: dict[int, LayeredView],
    loaded: LoadedModel,
    encoder: Encoder,
    examples: Dataset,
    backend: BackendArguments,
) -> dict[int, ExitCosts]:
    """By layer, what the parts of decoding cost: as a file says, or as measured here."""
    if flags.cost_file is not None:
        return read_costs(Path(flags.cost_file), list(views))
    return time_alone(
        lambda: {layer: time_exit(view, loaded, encoder, examples, backend) for layer, view in views.items()}
    )


def time_alone(measure: Callable[[], dict[int, ExitCosts]]) -> dict[int, ExitCosts]:
    """What the first process measures while the others wait, for all."""
    if not dist.is_initialized():
        return measure()
    dist.barrier()
    measured = [measure() if PartialState().is_main_process else None]
    dist.broadcast_object_list(measured)
    assert measured[0] is not None
    return measured[0]


def time_exit(
    view: LayeredView,
    loaded: LoadedModel,
    encoder: Encoder,
    examples: Dataset,
    backend: BackendArguments,
) -> ExitCosts:
    """What the parts of decoding with this exit cost on this machine."""
    assert view.exit_adapter is not None
    attach_exit_adapter(loaded.model, view.exit_adapter)
    fast = run_by_backend(loaded, backend)
    sources = list(examples["source"][-min(TIMED_ROWS, len(examples)) :])
    inputs = [encoder.inputs([source]).to(loaded.model.device) for source in sources]
    return measure_costs(fast, view.exit_adapter.layer, inputs)


def conclude(
    flags: ExitTrainingArguments,
    loaded: LoadedModel,
    views: dict[int, LayeredView],
    costs: dict[int, ExitCosts],
    forecasts: dict[int, list[Forecast]],
) -> None:
    """Save the adapter of the fastest exit and say what it will bring."""
    if not PartialState().is_main_process:
        return
    rows = [row for layer, own in forecasts.items() for row in best_rows(layer, own, flags.min_agreement)]
    drafting = [row for row in rows if row["lossless"]]
    chosen = max(drafting, key=lambda row: row["speedup"])
    adapter = views[chosen["layer"]].exit_adapter
    assert adapter is not None
    attach_exit_adapter(loaded.model, adapter)
    dtype = torch.float16 if flags.half else None
    save_exit_adapter(loaded.model, flags.output_dir, dtype, flags.model_name_or_path)
    content = {
        "recommended": [row for row in rows if row["layer"] == chosen["layer"]],
        "forecasts": {layer: [one.as_row() for one in own] for layer, own in forecasts.items()},
        "cost_seconds": {layer: asdict(cost) for layer, cost in costs.items()},
        "arguments": asdict(flags),
        "environment": environment(loaded),
    }
    write_json(Path(flags.output_dir, "train_exit.json"), content)
    write_exit_card(Path(flags.output_dir), loaded, flags.model_name_or_path, content["recommended"])
    print_report(comparison_table("Forecast on held-out texts", COLUMNS, rows))
    print(
        f"Wrote the exit after layer {chosen['layer']} to {flags.output_dir}. Next: run.py "
        f"--exit_adapter_path {flags.output_dir} --use_shallow_deep True --lossless True "
        f"--shallow2deep_conf_threshold {chosen['threshold']} --max_pending_tokens {chosen['max_pending']}"
    )
    print(json.dumps({"recommended": content["recommended"]}))


def best_rows(layer: int, forecasts: list[Forecast], min_agreement: float) -> list[dict[str, Any]]:
    """The fastest lossless setting of an exit, and the fastest of FREE that changes few enough tokens."""
    found = {
        "lossless": best(forecasts, lossless=True),
        "FREE": best(forecasts, lossless=False, min_agreement=min_agreement),
    }
    return [
        {"layer": layer, "decoding": name, **one.as_row()} for name, one in found.items() if one is not None
    ]


if __name__ == "__main__":
    main()
