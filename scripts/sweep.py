"""Methods x thresholds x shallow layers x batch sizes on one data set, interleaved: quality against latency.

    python scripts/sweep.py --free checkpoints/debian-t5-free --calm checkpoints/debian-t5-calm \
        --dataset_name debian_de_en --output_dir save/sweep

Data flags are those of run.py. A JSON or YAML file of flags may come first; `--preset NAME` takes the one of
scripts/presets. `--resume_eval True` continues an interrupted sweep. Processes of torchrun share the rows,
and so do jobs with --num_shards (docs/clusters.md). --output_dir gets sweep.json and sweep.csv (figures),
records.jsonl (every output), traces.jsonl (what each layer would have predicted), and report.html.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.backend_arguments import BackendArguments
from util.data_arguments import DataArguments
from util.flag_help import answer_help
from util.shard_arguments import ShardArguments
from util.sweep_arguments import SweepArguments, expand_preset

if __name__ == "__main__":
    groups = (SweepArguments, DataArguments, BackendArguments, ShardArguments)
    answer_help(groups, __doc__)  # before torch is imported

from datasets import Dataset
from rich.text import Text

from models.confidence import SoftmaxGap
from models.exit_policy import Calm, FullDepth, StaticExit
from models.free import Free
from models.loading import LoadedModel
from models.prompt_lookup import PromptLookup
from models.threshold import AdaptiveThreshold, FixedThreshold
from util.backend import limit_threads
from util.console import command
from util.data_arguments import refuse_flags_of_run, require_split
from util.environment import environment
from util.evaluation.comparison import (
    LiveSetting,
    areas_under_curves,
    compare,
    decode_comparison,
    fastest_good,
    largest_batch,
    name_front,
    trace_output,
)
from util.evaluation.identity import hash_named_files, hash_rows, identify_model
from util.evaluation.records import EvaluationSettings, Trace, write_records
from util.evaluation.shards import Shards, join_shards, refuse_state_across_samples, tell_shard
from util.evaluation.timing_doubts import untrusted_timing
from util.files import locked_output_dir, write_json
from util.flags import Parser, expand_argument_file, non_default_settings, parse_groups, require
from util.methods import (
    BASELINE,
    CALM,
    FREE,
    FREE_ADAPTIVE,
    FREE_LOSSLESS,
    FREE_SHORTLIST,
    HF_GENERATE,
    STATIC,
    with_lookup,
)
from util.pieces import readable
from util.policies import build_measure, require_exits
from util.progress import track
from util.report.folders import read_folders
from util.report.heat_map import is_mixed
from util.report.page import REPORT_FILES, write_report
from util.report.table import format_interval
from util.setup import comparison_settings, open_checkpoint, read_split
from util.tables import color_by_depth, comparison_table, depth_legend, print_report, write_csv
from util.tasks import TASKS

GROUPS = (SweepArguments, DataArguments, BackendArguments, ShardArguments)
COLUMNS = {  # after the setting and its score
    "quality_share": "% of full",
    "unchanged": "unchanged",
    "tokens_per_second": "tokens/s",
    "ms_per_token": "ms/token",
    "speedup": "speed-up",
    "ideal_speedup": "ideal",
    "real_over_ideal": "real/ideal",
    "average_layers": "layers/token",
    "exit_share": "exits",
}
RESULT_FILES = ("sweep.json", "sweep.csv", "traces.jsonl", *REPORT_FILES)  # beside settings and records
COLOURED = (FREE, CALM)  # the methods whose outputs are printed, and of how many samples
COLOURED_SAMPLES = 3


def main(argv: list[str] | None = None) -> None:
    with command("Run the same command with --resume_eval True to continue."):
        argv = expand_preset(expand_argument_file(argv, Parser(GROUPS)))
        flags, data, backend, jobs = parse_groups(GROUPS, __doc__, argv)
        refuse_flags_of_run(data, reads=["resume_eval"], limits="use --num_samples")
        with locked_output_dir(Path(flags.output_dir), jobs.shard_index):
            sweep(flags, data, backend, join_shards(jobs))


def sweep(
    flags: SweepArguments, data: DataArguments, backend: BackendArguments, shards: Shards | None = None
) -> None:
    """Decode, and judge what all `shards` decoded (default: this process is the only one)."""
    shards = shards or Shards()
    learning = [method for method in flags.methods if method == FREE_ADAPTIVE]
    refuse_state_across_samples(shards, learning, "methods")
    require_split(data, flags.split)
    data.report_dir = flags.output_dir if shards.tells else None
    limit_threads(backend)
    paths = {"free": flags.free, "calm": flags.calm}
    of_calm = backend if flags.free is None else backend.without_exit()
    runs = {"free": (backend, flags.exit_adapter_path), "calm": (of_calm, None)}
    checkpoints = {name: open_checkpoint(path, data, *runs[name]) for name, path in paths.items() if path}
    check_checkpoints(flags, checkpoints)
    examples = read_split(data, flags.split, next(iter(checkpoints.values())), flags.num_samples)
    folder, settings = Path(flags.output_dir), build_settings(flags, checkpoints)
    given = non_default_settings(flags, data, backend)
    evaluation = replace(
        comparison_settings(data, folder / "records.jsonl"),
        batch_size=largest_batch(settings),
        resume=data.resume_eval,
        outcomes=tuple(folder / name for name in RESULT_FILES),
    )
    decoded = decode_comparison(
        settings,
        build_settings(flags, checkpoints),
        examples,
        evaluation,
        identify_sweep(given, checkpoints, examples),
        shards,
        begun=lambda: write_settings(folder, flags, given, data, settings, len(examples)),
    )
    if not decoded:
        tell_shard(shards, folder)
        return
    write_traces(folder / "traces.jsonl", settings, examples, evaluation, flags.trace_samples)
    write_figures(folder, settings, evaluation)
    write_report(read_folders([folder]), folder)
    print(
        f"Wrote sweep.json, sweep.csv, records.jsonl, traces.jsonl and report.html to {folder}. Next: open "
        f"{folder / 'report.html'}; scripts/sweep.py --help lists what else can be compared"
    )


def identify_sweep(
    settings: dict[str, Any], checkpoints: dict[str, LoadedModel], examples: Dataset
) -> dict[str, Any]:
    """All that the records depend on."""
    models = {
        f"{part} of --{name}": value
        for name, loaded in checkpoints.items()
        for part, value in identify_model(loaded).items()
    }
    return settings | hash_named_files(settings) | models | {"samples": hash_rows(examples)}


def build_settings(flags: SweepArguments, checkpoints: dict[str, LoadedModel]) -> list[LiveSetting]:
    """Fresh settings of all methods asked for, each at every batch size, full depth first."""
    settings = []
    for checkpoint, loaded in checkpoints.items():
        for size in flags.batch_sizes:
            for name, method, policy, parameters in describe_methods(flags, checkpoint, loaded, checkpoints):
                label = name if len(checkpoints) == 1 else f"{name} ({checkpoint})"
                label += "" if size == 1 else f" x{size}"
                live = {"loaded": loaded, "policy": policy}
                settings.append(LiveSetting(label, method, checkpoint, batch_size=size, **live, **parameters))
    return settings


MethodRow = tuple[str, str, Any, dict[str, Any]]
"""Name, method, policy (None: Hugging Face's loop) and the parameters that a Setting records."""


def describe_methods(
    flags: SweepArguments, checkpoint: str, loaded: LoadedModel, checkpoints: dict[str, LoadedModel]
) -> Iterator[MethodRow]:
    """Every method with every parameter on one checkpoint."""
    for tokens, lookup in lookups_of(flags):
        name = with_lookup(BASELINE, tokens)
        yield name, name, FullDepth(lookup), {}
    on_calm = checkpoint == "calm"
    methods = (on_calm and flags.calm_methods) or flags.methods
    if HF_GENERATE in methods:
        yield HF_GENERATE, HF_GENERATE, None, {}
    if STATIC in methods:
        layers = (on_calm and flags.calm_static_layers) or flags.static_layers
        adapter = loaded.view.exit_adapter
        depths = range(1, loaded.view.num_layers) if adapter is None else [adapter.layer]
        for layer in layers or depths:
            yield f"{STATIC} {layer}", STATIC, StaticExit(layer), {"shallow_layer": layer}
    if checkpoint == "free":
        yield from describe_free(flags, loaded)
    if CALM in methods and (on_calm or "calm" not in checkpoints):
        yield from describe_calm(flags, CALM, None)
        if flags.exit_layers:
            yield from describe_calm(
                flags, f"{CALM} at {','.join(map(str, flags.exit_layers))}", flags.exit_layers
            )


def describe_calm(flags: SweepArguments, method: str, layers: list[int] | None) -> Iterator[MethodRow]:
    for threshold in flags.calm_thresholds:
        policy = Calm(SoftmaxGap(), FixedThreshold(threshold), exit_layers=layers)
        yield f"{method} {threshold}", method, policy, {"threshold": threshold}


def describe_free(flags: SweepArguments, loaded: LoadedModel) -> Iterator[MethodRow]:
    """FREE's variants, at every shallow layer."""
    own = loaded.exit_config.shallow_exit_layer
    layers = flags.shallow_layers or ([] if own is None else [own])
    require(
        bool(layers) or not any(name.startswith(FREE) for name in flags.methods),
        f"--free {flags.free} was not trained with a --shallow_exit_layer: name --shallow_layers.",
    )
    for layer in layers:
        where = "" if layers == [own] else f" S{layer}"
        for method, value, policy in free_policies(flags, loaded, layer):
            kind = "zeta" if method == FREE_ADAPTIVE else "threshold"
            yield f"{method}{where} {value}", method, policy, {kind: value, "shallow_layer": layer}


def free_policies(
    flags: SweepArguments, loaded: LoadedModel, layer: int
) -> Iterator[tuple[str, float, Free]]:
    """Method, threshold (or zeta) and policy of each variant."""
    gap = SoftmaxGap()
    if FREE in flags.methods:
        for value, (tokens, lookup) in product(flags.free_thresholds, lookups_of(flags)):
            yield with_lookup(FREE, tokens), value, Free(layer, gap, FixedThreshold(value), lookup=lookup)
    if FREE_SHORTLIST in flags.methods and flags.conf_shortlist is not None:
        shortlist = build_measure("", "softmax", flags.conf_shortlist, loaded)
        for value in flags.free_thresholds:
            yield FREE_SHORTLIST, value, Free(layer, shortlist, FixedThreshold(value))
    if FREE_ADAPTIVE in flags.methods:
        for zeta in flags.adapt_zetas:
            yield FREE_ADAPTIVE, zeta, Free(layer, gap, AdaptiveThreshold(0.5, zeta))
    if FREE_LOSSLESS in flags.methods:
        for value, (tokens, lookup) in product(flags.lossless_thresholds, lookups_of(flags)):
            threshold, cap = FixedThreshold(value), flags.max_pending_tokens
            policy = Free(layer, gap, threshold, lossless=True, max_pending=cap, lookup=lookup)
            yield with_lookup(FREE_LOSSLESS, tokens), value, policy


def lookups_of(flags: SweepArguments) -> list[tuple[int | None, PromptLookup | None]]:
    """None first, and then each with how many tokens it proposes."""
    return [(None, None), *((tokens, PromptLookup(tokens)) for tokens in flags.lookup_tokens)]


def check_checkpoints(flags: SweepArguments, checkpoints: dict[str, LoadedModel]) -> None:
    """Refuse checkpoints that are asked in different ways, and layers that one of them has not."""
    prompts = {loaded.prompt for loaded in checkpoints.values()}
    require(len(prompts) == 1, "--free and --calm: one has an encoder, the other has none; sweep them apart.")
    free, calm = checkpoints.get("free"), checkpoints.get("calm")
    readers = [("shallow_layers", free), ("exit_layers", calm or free)]
    if STATIC in flags.methods:
        readers.append(("static_layers", free))
    if STATIC in (flags.calm_methods or flags.methods):
        readers.append(("calm_static_layers" if flags.calm_static_layers else "static_layers", calm))
    for name, loaded in readers:
        if loaded is not None:
            require_exits(name, getattr(flags, name), loaded.view.num_layers)
    adapter = None if free is None else free.view.exit_adapter
    if adapter is not None:
        for name in ("static_layers", "shallow_layers"):
            fitting = {*getattr(flags, name)} <= {adapter.layer}
            require(fitting, f"--{name}: the exit adapter stands after layer {adapter.layer} alone.")


def write_settings(
    folder: Path,
    flags: SweepArguments,
    given: dict[str, Any],
    data: DataArguments,
    settings: list[LiveSetting],
    samples: int,
) -> None:
    """What was run, for reports."""
    named = data.dataset_name or getattr(data, f"{flags.split}_file")
    content = {
        "arguments": asdict(flags) | given,
        "environment": environment(settings[0].loaded),
        "dataset": named,
        "split": flags.split,
        "task": data.task,
        "main_score": TASKS[data.task].main_score,
        "samples": samples,
        "interleaved": True,  # so that the times of settings compare
        "settings": [setting.as_row() for setting in settings],
    }
    write_json(folder / "settings.json", content)


def write_traces(
    path: Path, settings: list[LiveSetting], examples: Dataset, evaluation: EvaluationSettings, count: int
) -> None:
    """What every layer predicts along full depth's outputs, and along the first `count` of the others. What
    is seen along an output does not depend on how it came about: equal ones are traced once."""
    seen: dict[tuple[Any, ...], Trace] = {}

    def traces() -> Iterator[Trace]:
        for setting in track(settings, "Tracing", "setting"):
            if setting.batch_size > 1:
                continue
            chosen = setting.records if setting.method == BASELINE else setting.records[:count]
            for record in chosen:
                output = (setting.checkpoint, record.row, *record.pieces)
                if output not in seen:
                    seen[output] = trace_output(setting, record, examples[record.row]["source"], evaluation)
                yield replace(seen[output], setting=setting.name, exit_layers=record.exit_layers)

    write_records(path, traces())


def write_figures(folder: Path, settings: list[LiveSetting], evaluation: EvaluationSettings) -> None:
    """Write and print the figures, with a few outputs coloured by exit depth."""
    quality = TASKS[evaluation.task].main_score
    rows = compare(settings, evaluation)
    areas, fastest, doubts = areas_under_curves(rows), fastest_good(rows), untrusted_timing(rows)
    summary = {"auc": areas, "fastest_99": fastest, "pareto": name_front(rows, quality)}
    summary["untrusted_timing"] = doubts
    write_json(folder / "sweep.json", {"rows": rows, **summary})
    write_csv(folder / "sweep.csv", rows)
    best = [{"method": name, "auc": area} for name, area in areas.items()]
    print_report(
        comparison_table(
            f"{rows[0]['samples']} samples",
            {"name": "setting", quality: quality.upper(), **COLUMNS},
            [row | {"speedup": show_speedup(row)} for row in rows],
        ),
        comparison_table("Area under quality against latency", {"method": "method", "auc": "AUC"}, best),
        f"Fastest at 99% of full quality: {', '.join(filter(None, fastest.values()))}",
        *([doubts] if doubts else []),
        *color_samples(choose_colored(settings, fastest)),
    )
    print(json.dumps(summary))


def show_speedup(row: dict[str, Any]) -> str:
    interval = None if row["method"] == BASELINE else row["speedup_interval"]
    return f"{row['speedup']:.2f} {format_interval(interval)}"


def choose_colored(settings: list[LiveSetting], fastest: dict[str, str | None]) -> list[LiveSetting]:
    """Of each method in COLOURED its fastest good setting at batch 1, or its first where none is good."""
    chosen = []
    for method in COLOURED:
        own = [setting for setting in settings if setting.method == method and setting.batch_size == 1]
        best = [setting for setting in own if setting.name == fastest.get(method)]
        chosen += (best or own)[:1]
    return chosen


def color_samples(settings: list[LiveSetting]) -> list[Text]:
    """A few short outputs of mixed depth, each token coloured by its exit."""
    if not settings:
        return []
    lines = [depth_legend()]
    mixed = [
        row
        for row, record in enumerate(settings[0].records)
        if len(set(record.pieces)) > 4 and is_mixed(record) and record.tokens <= 20
    ]
    for row in mixed[:COLOURED_SAMPLES]:
        lines.append(Text(f"\nreference  {settings[0].records[row].reference}"))
        for setting in settings:
            record = setting.records[row]
            pieces = list(map(readable, record.pieces))
            text = color_by_depth(pieces, record.exit_layers, setting.num_layers)
            lines.append(Text(f"{setting.method:<11}").append_text(text))
    return lines


if __name__ == "__main__":
    main()
