"""Certify a threshold of FREE or CALM: the fastest whose loss against full depth stays within a tolerance.

    python scripts/calibrate.py --model_name_or_path checkpoints/debian-t5-free --dataset_name debian_de_en \
        --use_shallow_deep True --delta 0.1 --epsilon 0.05 --output_dir save/calibration

Besides the flags below it takes those of run.py (model, data, method, lengths, batch size; `--resume_eval
True` continues an interrupted calibration, or judges its outputs anew with another --delta). Candidates and
full depth decode each batch in turn. Processes of torchrun share the rows, and so do jobs with --num_shards
(docs/clusters.md). --output_dir gets calibrated_threshold.json, for `run.py
--calibrated_threshold_file`, losses.npz, for scripts/simulate_calibration.py, and records.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.arguments import OUR_GROUPS
from util.flag_help import answer_help
from util.script_arguments import CONSISTENCIES, CalibrationArguments
from util.shard_arguments import ShardArguments

if __name__ == "__main__":
    groups = (CalibrationArguments, *OUR_GROUPS, ShardArguments)
    answer_help(groups, __doc__, training=True)  # before torch is imported

import numpy as np
from datasets import Dataset

from models.loading import LoadedModel
from run import evaluation_dtype, evaluation_settings, open_model
from util.arguments import Arguments, parse_with_run
from util.backend import run_by_backend
from util.calibration.certificate import CalibratedThreshold, decoding_settings, describe_data
from util.calibration.consistency import consistency_losses, sample_scores
from util.calibration.risk_control import certify, fastest, monotone, needed_samples
from util.console import command
from util.data_arguments import LEAVE_IT_OUT, OF_RUN_ALONE, require_split
from util.device import move_model
from util.environment import environment
from util.evaluation.comparison import LiveSetting, compare_speed, decode_comparison
from util.evaluation.decode import identify_run
from util.evaluation.identity import identify_model
from util.evaluation.records import EvaluationSettings, best_windows
from util.evaluation.shards import Shards, join_shards, tell_shard
from util.evaluation.summary import summarize_depth, texts_of
from util.evaluation.timing_doubts import untrusted_timing
from util.exit_arguments import ExitArguments
from util.files import locked_output_dir, written_aside
from util.flags import differs, flags_in, refuse_unread_flags, require
from util.methods import BASELINE
from util.policies import build_policy, with_threshold
from util.setup import read_split
from util.tables import comparison_table, print_report

GROUPS = (CalibrationArguments, ShardArguments)
CERTIFICATE, LOSSES = "calibrated_threshold.json", "losses.npz"
SPEEDS = {"layers": "ideal_speedup", "seconds": "speedup"}  # by --fastest_by
COLUMNS = {
    "threshold": "threshold",
    "layers_per_token": "layers/token",
    "ideal_speedup": "ideal",
    "speedup": "speed-up",
    "risk": "observed loss",
}


def main(argv: list[str] | None = None) -> None:
    with command("Run the same command with --resume_eval True to continue."):
        flags, jobs, arguments = parse_flags(argv)
        with locked_output_dir(Path(arguments.training.output_dir), jobs.shard_index):
            calibrate(flags, arguments, join_shards(jobs))


def parse_flags(argv: list[str] | None) -> tuple[CalibrationArguments, ShardArguments, Arguments]:
    """The flags of this script, and the others as run.py understands them."""
    argv = [*(sys.argv[1:] if argv is None else argv), "--do_eval", "True"]
    flags, jobs, arguments = parse_with_run(GROUPS, __doc__, argv)
    exits, training = arguments.exit, arguments.training
    require(not training.do_train, "--do_train: calibration is for a finished model.")
    require(not training.do_predict, "--do_predict: name the split to calibrate on with --split.")
    require(
        exits.use_early_exit or exits.use_shallow_deep,
        "Nothing to calibrate: add --use_early_exit True or --use_shallow_deep True.",
    )
    refuse_unread(flags, arguments)
    for spec in exits.uncertified():
        require(not differs(exits, spec), f"--{spec.name} contradicts a calibration over --thresholds.")
    return flags, jobs, arguments


def refuse_unread(flags: CalibrationArguments, arguments: Arguments) -> None:
    """Raise UserError for flags of run.py that a calibration on --split does not read."""
    limits = {"validation": "max_eval_samples", "test": "max_predict_samples"}
    own = limits.pop(flags.split)
    (other,) = limits.values()
    instead = {other: f"with --split {flags.split}, use --{own}", "max_train_samples": f"use --{own}"}
    refuse_unread_flags(arguments.data, OF_RUN_ALONE | instead)
    losses = {spec.name for spec in flags_in(arguments.loss)} - {"paper_settings"}
    refuse_unread_flags(arguments.loss, dict.fromkeys(sorted(losses), f"it is of training; {LEAVE_IT_OUT}"))


def calibrate(flags: CalibrationArguments, arguments: Arguments, shards: Shards) -> None:
    """Decode the split at full depth and with every candidate, certify, save and print."""
    data, training = arguments.data, arguments.training
    require_split(data, flags.split)
    loaded, exit_flags = open_model(arguments)
    if not shards.tells:
        data.report_dir = None  # one job lists the rows that cannot be used
    limit = data.max_eval_samples if flags.split == "validation" else data.max_predict_samples
    examples = read_split(data, flags.split, loaded, limit)
    move_model(loaded.model, training.device, evaluation_dtype(training))
    loaded = run_by_backend(loaded, arguments.evaluation_backend)
    settings = decode_candidates(flags, arguments, exit_flags, loaded, examples, shards)
    if settings is None:  # another process gathers and judges
        tell_shard(shards, Path(training.output_dir))
        return
    full, *early = settings
    losses = loss_matrices(data.task, full, early)
    rows = [describe(candidate, full) for candidate in early]
    folder = Path(training.output_dir)
    speedups = np.array([row["ideal_speedup"] for row in rows])
    with written_aside(folder / LOSSES) as aside, aside.open("wb") as file:
        np.savez(file, thresholds=flags.thresholds, ideal_speedups=speedups, **losses)
    sizes = (arguments.max_length, training.per_device_eval_batch_size)
    calibrated = CalibratedThreshold(
        **judge(flags, rows, losses[flags.consistency]),
        model=identify_model(loaded),
        data={"split": flags.split, **describe_data(examples, data)},
        settings=decoding_settings(exit_flags, data, loaded, *sizes),
        environment=environment(loaded),
    )
    calibrated.save(folder / CERTIFICATE)
    print_candidates(calibrated, folder)


def decode_candidates(
    flags: CalibrationArguments,
    arguments: Arguments,
    exit_flags: ExitArguments,
    loaded: LoadedModel,
    examples: Dataset,
    shards: Shards,
) -> list[LiveSetting] | None:
    """Full depth and every candidate with their records; None in all processes but the one that judges."""
    evaluation = evaluation_settings(arguments, exit_flags, "records.jsonl", (LOSSES, CERTIFICATE))
    evaluation.arguments |= {"split": flags.split, "thresholds": flags.thresholds}
    settings = build_settings(flags, exit_flags, loaded, evaluation)
    identity = identify_run(loaded, examples, evaluation)
    # No policy here learns: the settings warm up themselves.
    decoded = decode_comparison(settings, settings, examples, evaluation, identity, shards)
    return settings if decoded else None


def build_settings(
    flags: CalibrationArguments,
    exit_flags: ExitArguments,
    loaded: LoadedModel,
    evaluation: EvaluationSettings,
) -> list[LiveSetting]:
    """Full depth, then every candidate."""

    def live(name: str, method: str, policy_flags: ExitArguments, value: float | None = None) -> LiveSetting:
        policy = build_policy(policy_flags, loaded, evaluation.max_length)
        size = evaluation.batch_size
        return LiveSetting(name, method, "", value, batch_size=size, loaded=loaded, policy=policy)

    full = live(BASELINE, BASELINE, ExitArguments(use_synchronize=exit_flags.use_synchronize))
    method = " ".join(exit_flags.methods)
    return [full] + [
        live(f"threshold {value}", method, with_threshold(exit_flags, value), value)
        for value in flags.thresholds
    ]


def loss_matrices(task: str, full: LiveSetting, early: list[LiveSetting]) -> dict[str, np.ndarray]:
    """Losses (n samples, K candidates) by kind of consistency."""
    full_texts, references = texts_of(best_windows(full.records))
    scores = sample_scores(task, full_texts, references)
    columns = [
        consistency_losses(task, texts_of(best_windows(one.records))[0], full_texts, references, scores)
        for one in early
    ]
    return {kind: np.stack([column[kind] for column in columns], axis=1) for kind in CONSISTENCIES}


def describe(candidate: LiveSetting, full: LiveSetting) -> dict[str, Any]:
    """A candidate's row of the table, but for what the losses say."""
    exits = candidate.exit_layers
    depth = summarize_depth(candidate.records, exits, len(exits), candidate.num_layers)
    return {
        "name": candidate.name,
        "threshold": candidate.threshold,
        "layers_per_token": depth["average_layers"],
        "ideal_speedup": depth["ideal_speedup"],
        **compare_speed(candidate.records, full.records),
        "exit_share": depth["exit_share"],
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
        "epsilon": None if flags.method == "crc" else flags.epsilon,
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


def print_candidates(calibrated: CalibratedThreshold, folder: Path) -> None:
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
    table = comparison_table(title, columns, shown)
    doubts = untrusted_timing(calibrated.candidates)
    print_report(table, verdict(calibrated), *([] if doubts is None else [doubts]))
    path = folder / CERTIFICATE
    failed = "raise --delta with --resume_eval True, or decode more samples"
    after = failed if calibrated.threshold is None else f"run.py --calibrated_threshold_file {path}"
    print_report(f"Wrote {path}. Next: {after}")


def verdict(calibrated: CalibratedThreshold) -> str:
    """One sentence: what was certified, or what is missing."""
    promise = f"{calibrated.consistency} loss <= {calibrated.delta:g} " + (
        "in expectation" if calibrated.epsilon is None else f"with probability {1 - calibrated.epsilon:g}"
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
