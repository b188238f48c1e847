"""Decode the same sentences with every method, interleaved, and report quality against speed.

python scripts/compare.py --free checkpoints/debian-t5-free --calm checkpoints/debian-t5-calm
Writes report.json, report.csv and report.png to --output_dir and prints one table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.confidence import SoftmaxGap
from models.errors import UserError, one_line_errors
from models.exit_policy import Calm, FullDepth, StaticExit
from models.families import view_for
from models.free import Free
from models.loading import LoadedModel, load_model
from models.threshold import AdaptiveThreshold, FixedThreshold
from util.arguments import DataArguments
from util.console import prepare_console
from util.data.examples import dataset_record, load_examples, target_language
from util.data.preparation import prepare
from util.environment import environment
from util.evaluation.comparison import LiveSetting, compare, decode_interleaved, warm_up
from util.evaluation.records import BASELINE, HF_GENERATE, EvaluationSettings
from util.evaluation.timing_doubts import untrusted_timing
from util.files import locked_output_dir, write_json
from util.plots import plot_trade_off
from util.tables import color_by_depth, comparison_table, depth_legend, print_report, write_csv
from util.tasks import DATASETS, TASKS

SHOWN = ("FREE, fixed", "CALM")  # their outputs are printed in colour


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--free", required=True, help="checkpoint trained with a shallow-deep loss")
    parser.add_argument(
        "--calm", help="checkpoint trained with losses at all layers (default: leave CALM out)"
    )
    parser.add_argument("--dataset_name", default="debian_de_en", choices=tuple(DATASETS))
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--num_samples", type=int, help="default: all")
    parser.add_argument("--max_source_length", type=int, default=28, help="longer sources are left out")
    parser.add_argument("--max_target_length", type=int, default=28, help="longer targets are left out")
    parser.add_argument("--free_threshold", type=float, default=0.4)
    parser.add_argument("--calm_threshold", type=float, default=0.9)
    parser.add_argument("--adapt_zeta", type=float, default=0.8, help="of the adaptive threshold")
    parser.add_argument("--lossless_threshold", type=float, default=0.3, help="of lossless FREE")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output_dir", type=Path, default=Path("save/compare"))
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    prepare_console()
    with one_line_errors(), locked_output_dir(flags.output_dir):
        run(flags)


def run(flags: argparse.Namespace) -> None:
    if flags.threads:
        torch.set_num_threads(flags.threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    paths = {"free": flags.free, "calm": flags.calm}
    checkpoints = {name: load_model(path) for name, path in paths.items() if path is not None}
    for loaded in checkpoints.values():
        loaded.model.to(device)
    data = data_arguments(flags)
    for loaded in checkpoints.values():
        prepare(loaded, data)
    examples = load_examples(
        dataset_record(data), data, flags.split, checkpoints["free"].tokenizer, flags.num_samples
    )
    evaluation = EvaluationSettings(
        data.task,
        data.max_source_length,
        data.val_max_target_length,
        flags.output_dir / "predictions.jsonl",
        language=target_language(data),
    )
    warm_up(build_settings(flags, checkpoints), examples, evaluation)
    settings = build_settings(flags, checkpoints)
    decode_interleaved(settings, examples, evaluation)
    report(flags, settings, evaluation)


def data_arguments(flags: argparse.Namespace) -> DataArguments:
    return DataArguments(
        task=DATASETS[flags.dataset_name].task,
        dataset_name=flags.dataset_name,
        max_source_length=flags.max_source_length,
        max_target_length=flags.max_target_length,
        val_max_target_length=2 * flags.max_target_length,
        drop_long_samples=True,
    )


def build_settings(flags: argparse.Namespace, checkpoints: dict[str, LoadedModel]) -> list[LiveSetting]:
    """Every method on the checkpoint that was trained for it, baselines first."""
    shallow = checkpoints["free"].exit_config.shallow_exit_layer
    if shallow is None:
        raise UserError(f"--free {flags.free}: not trained with a --shallow_exit_layer.")
    middle = view_for(checkpoints["free"].model).num_layers // 2
    fixed = FixedThreshold(flags.free_threshold)
    adaptive = AdaptiveThreshold(flags.free_threshold, flags.adapt_zeta)
    lossless = Free(shallow, SoftmaxGap(), FixedThreshold(flags.lossless_threshold), lossless=True)
    chosen = [
        (HF_GENERATE, "free", None),
        (BASELINE, "free", FullDepth()),
        (f"Static, layer {shallow}", "free", StaticExit(shallow)),
        ("FREE, fixed", "free", Free(shallow, SoftmaxGap(), fixed)),
        ("FREE, adaptive", "free", Free(shallow, SoftmaxGap(), adaptive)),
        ("FREE, lossless", "free", lossless),
        (BASELINE, "calm", FullDepth()),
        (f"Static, layer {middle}", "calm", StaticExit(middle)),
        ("CALM", "calm", Calm(SoftmaxGap(), FixedThreshold(flags.calm_threshold))),
    ]
    return [
        LiveSetting(f"{name} ({key})", name, key, loaded=checkpoints[key], policy=policy)
        for name, key, policy in chosen
        if key in checkpoints
    ]


def report(flags: argparse.Namespace, settings: list[LiveSetting], evaluation: EvaluationSettings) -> None:
    quality = TASKS[evaluation.task].main_score
    rows = compare(settings, evaluation)
    arguments = {name: str(value) for name, value in vars(flags).items()}
    context = {"arguments": arguments, "environment": environment(settings[0].loaded.model)}
    doubts = untrusted_timing(rows)
    write_json(flags.output_dir / "report.json", {**context, "untrusted_timing": doubts, "rows": rows})
    write_csv(flags.output_dir / "report.csv", rows)
    plot_trade_off(flags.output_dir / "report.png", rows, quality, rows[1])
    columns = {
        "method": "method",
        "checkpoint": "model",
        quality: quality.upper(),
        "quality_share": "% of full",
        "tokens_per_second": "tokens/s",
        "ms_per_token": "ms/token",
        "speedup": "speed-up",
        "ideal_speedup": "ideal",
        "average_layers": "layers",
        "exit_share": "exits",
    }
    title = f"{flags.dataset_name}, {rows[0]['samples']} {flags.split} samples, batch 1, greedy"
    print_report(
        comparison_table(title, columns, rows), doubts or "", depth_legend(), *show_samples(settings)
    )
    print_report(
        f"\nWrote report.json, report.csv and report.png to {flags.output_dir}. Next: scripts/sweep.py tries "
        "other thresholds and layers"
    )


def show_samples(settings: list[LiveSetting], count: int = 3) -> list[Any]:
    """A few sentences of mixed depth as FREE and CALM decoded them, each token coloured by its exit."""
    lines: list[Any] = []
    shown = [setting for setting in settings if setting.method in SHOWN]
    mixed = [
        i
        for i, record in enumerate(shown[0].records)
        if len(set(record.pieces)) > 4 and len(set(record.exit_layers)) == 2 and record.tokens <= 20
    ]
    for index in mixed[:count]:
        lines.append(f"\nreference  {shown[0].records[index].reference}")
        for setting in shown:
            record = setting.records[index]
            pieces = [piece.replace("▁", " ") for piece in record.pieces]
            text = color_by_depth(pieces, record.exit_layers, setting.num_layers)
            lines.append(Text(f"{setting.method:<11}").append_text(text))
    return lines


if __name__ == "__main__":
    main()
