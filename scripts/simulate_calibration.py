"""How often does a certificate fail? Calibrate over and over on samples whose true risk is known.

    python scripts/simulate_calibration.py --losses_file save/calibration/losses.npz \
        --output_dir save/simulation

The losses that scripts/calibrate.py decoded are the population: calibration sets are drawn from it with
replacement. --output_dir gets simulation.json, simulation.csv and simulation.png (speed-up against delta).
"""

from __future__ import annotations

import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import SimulationArguments

if __name__ == "__main__":
    answer_help((SimulationArguments,), __doc__)  # before what is slow is imported

import numpy as np
from matplotlib.figure import Figure

from models.errors import UserError
from util.calibration.risk_control import check_losses, simulate
from util.console import command
from util.files import locked_output_dir, write_json
from util.flags import parse_groups, require, require_file
from util.progress import track
from util.report.figures import MARKERS
from util.tables import comparison_table, print_report, write_csv

COLUMNS = {
    "method": "method",
    "delta": "delta",
    "violation_rate": "violations",
    "mean_risk": "mean risk",
    "mean_speedup": "ideal speed-up",
    "certified_share": "certified",
}


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((SimulationArguments,), __doc__, argv)
        with locked_output_dir(Path(flags.output_dir)) as folder:
            write_results(flags, simulate_all(flags, *read_losses(flags)), folder)


def read_losses(flags: SimulationArguments) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N, K) and speed-ups (K,) of the candidates, from conservative to liberal."""
    path = Path(flags.losses_file)
    require_file("losses_file", path)
    try:
        with np.load(path) as arrays:
            losses, speedups = check_losses(arrays[flags.consistency]), arrays["ideal_speedups"]
    except UserError as error:
        raise UserError(f"--losses_file {path}: {error}") from error
    except (ValueError, IndexError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--losses_file {path} is not what scripts/calibrate.py writes.") from error
    kept = speedups.shape == losses.shape[1:] and speedups.dtype.kind == "f" and np.isfinite(speedups).all()
    require(bool(kept), f"--losses_file {path}: ideal_speedups must hold one number a candidate.")
    return losses, speedups


def simulate_all(
    flags: SimulationArguments, population: np.ndarray, speedups: np.ndarray
) -> list[dict[str, Any]]:
    """One row a method and tolerance; all see the same calibration sets."""
    procedures = [
        (method, p_value)
        for method in flags.methods
        for p_value in (flags.p_values if method != "crc" else flags.p_values[:1])  # crc tests nothing
    ]
    cases = [(*procedure, delta) for procedure in procedures for delta in sorted(flags.deltas)]
    rows = []
    for method, p_value, delta in track(cases, "Simulating", "case"):
        result = simulate(
            population,
            speedups,
            method,
            delta,
            flags.epsilon,
            p_value,
            flags.size,
            flags.resamples,
            flags.seed,
        )
        name = method if method == "crc" else f"{method}, {p_value.replace('_', '-')}"
        rows.append({"method": name, "delta": delta, **asdict(result)})
    return rows


def write_results(flags: SimulationArguments, rows: list[dict[str, Any]], folder: Path) -> None:
    write_json(folder / "simulation.json", {"arguments": asdict(flags), "rows": rows})
    write_csv(folder / "simulation.csv", rows)
    plot_speedups(folder / "simulation.png", rows, flags.consistency)
    shown = [
        row
        | {name: f"{row[name]:.3f}" for name in ("delta", "violation_rate", "certified_share")}
        | {"mean_risk": f"{row['mean_risk']:.4f}"}
        for row in rows
    ]
    title = f"{flags.resamples} calibrations each, {flags.consistency} loss, epsilon {flags.epsilon:g}"
    print_report(comparison_table(title, COLUMNS, shown), f"Wrote {folder}")


def plot_speedups(path: Path, rows: list[dict[str, Any]], consistency: str) -> None:
    """Mean speed-up of the certified threshold against the tolerance, one line a method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [row for row in rows if row["method"] == method]
        x, y = ([row[name] for row in points] for name in ("delta", "mean_speedup"))
        axes.plot(x, y, marker=MARKERS[index % len(MARKERS)], markersize=5, label=method, alpha=0.8)
    axes.set_xlabel(f"tolerated {consistency} loss (delta)")
    axes.set_ylabel("mean certified speed-up (ideal)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
