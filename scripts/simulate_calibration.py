"""How often does a certificate fail? Calibrate over and over on samples whose true risk is known.

    python scripts/simulate_calibration.py --losses_file save/calibration/losses.npz \
        --output_dir save/simulation

The losses that scripts/calibrate.py decoded are the population: calibration sets are drawn from it with
replacement. --output_dir gets simulation.json, simulation.csv and simulation.png (speed-up against delta).
"""

from __future__ import annotations

import sys
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError, one_line_errors
from util.arguments import Parser, flag, list_flag, locked_output_dir, require, require_positive
from util.calibration.consistency import CONSISTENCIES
from util.calibration.risk_control import METHODS, P_VALUES, check_losses, simulate
from util.progress import track
from util.tables import MARKERS, comparison_table, print_report, write_csv, write_json

DELTAS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)
COLUMNS = {
    "method": "method",
    "delta": "delta",
    "violation_rate": "violations",
    "mean_risk": "mean risk",
    "mean_speedup": "ideal speed-up",
    "certified_share": "certified",
}


@dataclass
class SimulationArguments:
    losses_file: str = field(metadata={"help": "The losses.npz of scripts/calibrate.py."})
    output_dir: str = field(metadata={"help": "Where results are written."})
    deltas: list[float] = list_flag(DELTAS, "Tolerated losses, in (0, 1).")
    epsilon: float = flag(0.05, "Tolerated probability of a violation.")
    methods: list[str] = list_flag(METHODS, f"Of {', '.join(METHODS)}.")
    p_values: list[str] = list_flag(P_VALUES, f"Of {', '.join(P_VALUES)}.")
    consistency: str = flag("textual", "Which loss.", CONSISTENCIES)
    size: int | None = flag(None, "Samples in a calibration set (default: as many as were decoded).")
    resamples: int = flag(200, "Calibration sets.")
    seed: int = flag(0, "Draws of them.")

    def __post_init__(self) -> None:
        for name, values in {"deltas": self.deltas, "epsilon": [self.epsilon]}.items():
            require(all(0 < value < 1 for value in values), f"--{name} must lie between 0 and 1.")
        for name, known in {"methods": METHODS, "p_values": P_VALUES}.items():
            unknown = sorted(set(getattr(self, name)) - set(known))
            require(
                not unknown, f"--{name}: there is no {', '.join(unknown)}; choose from {', '.join(known)}."
            )
        require_positive("size", self.size)
        require_positive("resamples", self.resamples)


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        flags = parse_flags(argv)
        with locked_output_dir(Path(flags.output_dir)) as folder:
            write_results(flags, simulate_all(flags, *read_losses(flags)), folder)


def parse_flags(argv: list[str] | None) -> SimulationArguments:
    parser = Parser((SimulationArguments,), description=__doc__)
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    except ValueError as error:  # unknown flags
        raise UserError(" ".join(str(error).split())) from error


def read_losses(flags: SimulationArguments) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N, K) and speed-ups (K,) of the candidates, from conservative to liberal."""
    path = Path(flags.losses_file)
    require(path.is_file(), f"--losses_file: there is no file {path}.")
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
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
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
    plt.close(figure)


if __name__ == "__main__":
    main()
