"""Certify a threshold of FREE or CALM: the fastest whose loss against full depth stays within a tolerance.

    python scripts/calibrate.py --model_name_or_path checkpoints/debian-t5-free --dataset_name debian_de_en \
        --use_shallow_deep True --delta 0.1 --epsilon 0.05 --output_dir save/calibration

Besides the flags below it takes those of run.py (model, data, method, lengths, batch size; `--resume_eval
True` continues an interrupted calibration, or judges its outputs anew with another --delta). --output_dir
gets calibrated_threshold.json, for `run.py --calibrated_threshold_file`, and losses.npz, for
scripts/simulate_calibration.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.arguments import OUR_GROUPS
from util.flag_help import answer_help
from util.script_arguments import CalibrationArguments

if __name__ == "__main__":
    answer_help((CalibrationArguments, *OUR_GROUPS), __doc__, training=True)  # before torch is imported

import numpy as np
from datasets import Dataset
from transformers import set_seed

from models.decoder_view import view_for
from models.errors import one_line_errors
from models.loading import LoadedModel
from run import build_model, evaluation_settings, longest_output, place
from util.arguments import (
    Arguments,
    ExitArguments,
    Parser,
    expand_argument_file,
    parse_arguments,
    require,
    require_split,
)
from util.calibrated_threshold import CalibratedThreshold, decoding_settings, describe_data
from util.calibration import certify, fastest, monotone, needed_samples
from util.consistency import CONSISTENCIES, consistency_losses, sample_scores
from util.console import prepare_console
from util.data import dataset_record, load_examples
from util.evaluation import best_windows, decode_split, fingerprint, summarize_depth, texts_of
from util.metrics import Reference
from util.policies import build_policy, resolve_exit_arguments, threshold_flag, with_threshold
from util.progress import track
from util.report import comparison_table, environment, print_report

SPEEDS = {"layers": "ideal_speedup", "seconds": "speedup"}  # by --fastest_by
COLUMNS = {
    "threshold": "threshold",
    "layers_per_token": "layers/token",
    "ideal_speedup": "ideal",
    "speedup": "speed-up",
    "risk": "observed loss",
}


@dataclass
class Outcome:
    """What decoding a split with one policy led to."""

    texts: list[str]
    references: list[Reference]
    depth: dict[str, float]
    seconds: float


def main(argv: list[str] | None = None) -> None:
    prepare_console()
    with one_line_errors():
        calibrate(*parse_flags(argv))


def parse_flags(argv: list[str] | None) -> tuple[CalibrationArguments, Arguments]:
    """The flags of this script, and the others as run.py understands them."""
    argv = expand_argument_file(list(sys.argv[1:] if argv is None else argv))
    answer_help((CalibrationArguments, *OUR_GROUPS), __doc__, True, argv)
    parser = Parser((CalibrationArguments,), description=__doc__, allow_abbrev=False)
    flags, others = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    arguments = parse_arguments([*others, "--do_eval", "True"])
    exits, training = arguments.exit, arguments.training
    require(not training.do_train, "--do_train: calibration is for a finished model.")
    require(not training.do_predict, "--do_predict: name the split to calibrate on with --split.")
    require(
        exits.use_early_exit or exits.use_shallow_deep,
        "Nothing to calibrate: add --use_early_exit True or --use_shallow_deep True.",
    )
    for name in ("use_adapt_threshold", "lossless", "calibrated_threshold_file", threshold_flag(exits)):
        given = getattr(exits, name) != ExitArguments.__dataclass_fields__[name].default
        require(not given, f"--{name} contradicts a calibration over --thresholds.")
    return flags, arguments


def calibrate(flags: CalibrationArguments, arguments: Arguments) -> None:
    """Decode the split at full depth and with every candidate, certify, save and report."""
    data, training = arguments.data, arguments.training
    require_split(data, flags.split)
    set_seed(training.seed)
    loaded = build_model(arguments)
    exit_flags = resolve_exit_arguments(arguments.exit, loaded.exit_config, view_for(loaded.model).num_layers)
    limit = data.max_eval_samples if flags.split == "validation" else data.max_predict_samples
    examples = load_examples(dataset_record(data), data, flags.split, loaded.tokenizer, limit)
    place(loaded, training)
    outcomes = decode_candidates(flags, arguments, exit_flags, loaded, examples)
    if outcomes is None:  # another process gathers and judges
        return
    full, *early = outcomes
    losses = loss_matrices(data.task, full, early)
    rows = [describe(value, outcome, full) for value, outcome in zip(flags.thresholds, early, strict=True)]
    folder = Path(training.output_dir)
    speedups = np.array([row["ideal_speedup"] for row in rows])
    np.savez(folder / "losses.npz", thresholds=flags.thresholds, ideal_speedups=speedups, **losses)
    lengths = (longest_output(arguments), training.per_device_eval_batch_size)
    calibrated = CalibratedThreshold(
        **judge(flags, rows, losses[flags.consistency]),
        model=fingerprint(loaded),
        data={"split": flags.split, **describe_data(examples, data)},
        settings=decoding_settings(exit_flags, data, *lengths),
        environment=environment(loaded.model),
    )
    calibrated.save(folder / "calibrated_threshold.json")
    report(calibrated, folder)


def decode_candidates(
    flags: CalibrationArguments,
    arguments: Arguments,
    exit_flags: ExitArguments,
    loaded: LoadedModel,
    examples: Dataset,
) -> list[Outcome] | None:
    """Full depth, then every candidate, writing samples as they come; None in all processes but the first."""
    policies = {"full_depth": ExitArguments(use_synchronize=exit_flags.use_synchronize)}
    policies |= {f"threshold_{value}": with_threshold(exit_flags, value) for value in flags.thresholds}
    outcomes = []
    for name, policy_flags in track([*policies.items()], "Calibrating", "candidate"):
        settings = evaluation_settings(arguments, policy_flags, f"{name}.jsonl")
        policy = build_policy(policy_flags, loaded, settings.max_length)
        records = decode_split(loaded, policy, examples, settings)
        if records is not None:
            outcomes.append(summarize_records(records, view_for(loaded.model).num_layers))
    return outcomes or None


def summarize_records(records: list[dict[str, Any]], num_layers: int) -> Outcome:
    exits = [layer for record in records for layer in record["exit_layers"]]
    depth = summarize_depth(records, exits, len(exits), num_layers)
    texts, references = texts_of(best_windows(records))
    return Outcome(texts, references, depth, sum(record["seconds"] for record in records))


def loss_matrices(task: str, full: Outcome, early: list[Outcome]) -> dict[str, np.ndarray]:
    """Losses (n samples, K candidates) by kind of consistency."""
    scores = sample_scores(task, full.texts, full.references)
    columns = [
        consistency_losses(task, outcome.texts, full.texts, full.references, scores) for outcome in early
    ]
    return {kind: np.stack([column[kind] for column in columns], axis=1) for kind in CONSISTENCIES}


def describe(threshold: float, outcome: Outcome, full: Outcome) -> dict[str, Any]:
    """A candidate's row of the table, but for what the losses say."""
    return {
        "threshold": threshold,
        "layers_per_token": outcome.depth["average_layers"],
        "ideal_speedup": outcome.depth["ideal_speedup"],
        "speedup": full.seconds / outcome.seconds,
        "exit_share": outcome.depth["exit_share"],
    }


def judge(flags: CalibrationArguments, rows: list[dict[str, Any]], losses: np.ndarray) -> dict[str, Any]:
    """What the losses (n, K) allow: the verdict's part of a CalibratedThreshold."""
    # Files are often sorted; bets are placed sample after sample.
    losses = np.random.default_rng(0).permutation(losses)
    result = certify(flags.method, losses, flags.delta, flags.epsilon, flags.p_value)
    risks = (monotone(losses) if flags.method == "crc" else losses).mean(axis=0)
    figure = figure_name(flags.method)
    for row, *values in zip(
        rows, risks.tolist(), result.figures.tolist(), result.certified.tolist(), strict=True
    ):
        row |= dict(zip(("risk", figure, "certified"), values, strict=True))
    best = fastest(result.certified, np.array([row[SPEEDS[flags.fastest_by]] for row in rows]))
    failed = None if result.certified.all() else float(risks[result.certified.sum()])
    needs = (flags.method, failed, flags.delta, flags.epsilon)
    return {
        "threshold": None if best is None else flags.thresholds[best],
        "delta": flags.delta,
        "epsilon": flags.epsilon,
        "method": flags.method,
        "p_value": None if flags.method == "crc" else flags.p_value,
        "consistency": flags.consistency,
        "fastest_by": flags.fastest_by,
        "samples": len(losses),
        "needed_samples": None if failed is None else needed_samples(*needs),
        "candidates": rows,
    }


def figure_name(method: str) -> str:
    return "p_value" if method == "ltt" else "bound"


def report(calibrated: CalibratedThreshold, folder: Path) -> None:
    figure = figure_name(calibrated.method)
    columns = COLUMNS | {figure: figure.replace("_", "-"), "certified": "certified"}
    shown = [
        row
        | {
            "risk": f"{row['risk']:.4f}",
            figure: f"{row[figure]:.2g}",
            "certified": "*" if row["certified"] else "",
        }
        for row in calibrated.candidates
    ]
    title = f"{calibrated.consistency} loss, {calibrated.samples} {calibrated.data['split']} samples"
    print_report(comparison_table(title, columns, shown), verdict(calibrated))
    path = folder / "calibrated_threshold.json"
    failed = "raise --delta, or give more samples, with --resume_eval True"
    after = failed if calibrated.threshold is None else f"run.py --calibrated_threshold_file {path}"
    print_report(f"Wrote {path}. Next: {after}")


def verdict(calibrated: CalibratedThreshold) -> str:
    """One sentence: what was certified, or what is missing."""
    promise = f"{calibrated.consistency} loss <= {calibrated.delta:g} " + (
        "in expectation" if calibrated.method == "crc" else f"with probability {1 - calibrated.epsilon:g}"
    )
    if calibrated.threshold is not None:
        row = next(row for row in calibrated.candidates if row["threshold"] == calibrated.threshold)
        return (
            f"Threshold {calibrated.threshold:g} is certified: {promise}; ideal speed-up "
            f"{row['ideal_speedup']:.2f}, measured {row['speedup']:.2f}."
        )
    first = calibrated.candidates[0]
    if calibrated.needed_samples is None:
        reason = f"is not below {calibrated.delta:g}: no number of samples would do"
    else:
        reason = f"would need {calibrated.needed_samples} samples, there are {calibrated.samples}"
    return (
        f"No threshold is certified ({promise}). The observed loss {first['risk']:.4f} of the most "
        f"conservative, {first['threshold']:g}, {reason}."
    )


if __name__ == "__main__":
    main()
