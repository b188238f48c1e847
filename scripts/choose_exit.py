"""Choose FREE's shallow layer and threshold: predict the speed-up of every candidate, then measure a few.

    python scripts/choose_exit.py --model_name_or_path checkpoints/debian-t5-free --dataset_name debian_de_en

One pass at full depth over a calibration split shows every layer's confidence and agreement with the last
layer; a cost model of this machine turns them into speed-ups. Data flags are those of run.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.backend_arguments import BackendArguments
from util.data_arguments import DataArguments
from util.flag_help import answer_help
from util.script_arguments import ChooserArguments

if __name__ == "__main__":
    answer_help((ChooserArguments, DataArguments, BackendArguments), __doc__)  # before torch is imported

import numpy as np
from datasets import Dataset

from models.confidence import SoftmaxGap
from models.exit_policy import FullDepth
from models.free import Free
from models.loading import LoadedModel
from models.threshold import FixedThreshold
from util.backend import limit_threads
from util.console import command
from util.data_arguments import refuse_flags_of_run, require_split
from util.environment import environment
from util.evaluation.comparison import LiveSetting, compare, decode_interleaved, trace_output, warm_up
from util.evaluation.cost_model import CostModel, Prediction, predict_free, recommend
from util.evaluation.records import EvaluationSettings
from util.evaluation.timing_doubts import doubt_prediction, untrusted_timing
from util.files import locked_output_dir, write_json
from util.flags import parse_groups, require
from util.methods import BASELINE, FREE
from util.policies import require_exits
from util.progress import track
from util.setup import comparison_settings, open_checkpoint, read_split
from util.tables import comparison_table, print_report
from util.tasks import TASKS

COLUMNS = {
    "shallow_layer": "layer",
    "threshold": "threshold",
    "agreement": "agreement",
    "unchanged": "unchanged",
    "exit_share": "exits",
    "speedup": "speed-up",
}
MEASURED_COLUMNS = COLUMNS | {"measured": "measured", "error": "error %", "quality_share": "% of full"}


def main(argv: list[str] | None = None) -> None:
    with command():
        flags, data, backend = parse_groups(
            (ChooserArguments, DataArguments, BackendArguments), __doc__, argv
        )
        refuse_flags_of_run(data, limits="use --num_samples")
        with locked_output_dir(Path(flags.output_dir)):
            data.report_dir = flags.output_dir
            choose(flags, data, backend)


def choose(flags: ChooserArguments, data: DataArguments, backend: BackendArguments) -> None:
    require_split(data, flags.split)
    limit_threads(backend)
    loaded = open_checkpoint(flags.model_name_or_path, data, backend)
    require(
        loaded.view.exit_adapter is None,
        "--model_name_or_path: of an exit adapter scripts/train_exit.py has said what to choose.",
    )
    examples = read_split(data, flags.split, loaded, flags.num_samples)
    evaluation = comparison_settings(data, Path(flags.output_dir, "records.jsonl"))
    full = LiveSetting(BASELINE, BASELINE, "", loaded=loaded, policy=FullDepth())
    candidates = list_candidates(flags, full.num_layers)
    warm_up([full], examples, evaluation)
    decode_interleaved([full], examples, evaluation)
    cost = measure_cost(full)
    traces = [
        trace_output(full, record, examples[record.row]["source"], evaluation)
        for record in track(full.records, "Tracing", "sample")
    ]
    predictions = [predict_free(cost, traces, layer, threshold) for layer, threshold in candidates]
    chosen = recommend(predictions, flags.min_agreement)
    tested = choose_tested(predictions, chosen, flags.measured)
    rows, full_seconds = measure(tested, loaded, examples, evaluation)
    expected = sum(cost.full_depth(len(trace.confidences), full.num_layers) for trace in traces)
    doubt = doubt_prediction(expected, full_seconds, " s")
    doubts = untrusted_timing([*rows, {"name": "full depth by the cost model", "timing_doubt": doubt}])
    write_choice(flags, cost, predictions, chosen, rows, doubts, environment(loaded))


def list_candidates(flags: ChooserArguments, num_layers: int) -> list[tuple[int, float]]:
    """Pairs of shallow layer and threshold."""
    layers = flags.shallow_layers or list(range(1, num_layers))
    require_exits("shallow_layers", layers, num_layers)
    return list(product(layers, flags.thresholds))


def measure_cost(full: LiveSetting) -> CostModel:
    tokens = [record.tokens for record in full.records]
    require(len(set(tokens)) > 1, "--num_samples: outputs of different lengths are needed; take more.")
    return CostModel.measure(full.loaded, tokens, [record.seconds for record in full.records])


def choose_tested(predictions: list[Prediction], chosen: Prediction | None, count: int) -> list[Prediction]:
    """`count` of the candidates: the recommended one, and others spread over the predicted speed-ups."""
    first = [] if chosen is None else [chosen][:count]
    rest = sorted((one for one in predictions if one is not chosen), key=lambda one: one.speedup)
    places = np.linspace(0, len(rest) - 1, min(count - len(first), len(rest)))
    return first + [rest[round(place)] for place in places]


def measure(
    tested: list[Prediction], loaded: LoadedModel, examples: Dataset, evaluation: EvaluationSettings
) -> tuple[list[dict[str, Any]], float]:
    """Decode with the candidates, interleaved with full depth: predicted beside measured figures, and full
    depth's seconds."""
    settings = [LiveSetting(BASELINE, BASELINE, "", loaded=loaded, policy=FullDepth())]
    for one in tested:
        policy = Free(one.shallow_layer, SoftmaxGap(), FixedThreshold(one.threshold))
        name = f"layer {one.shallow_layer}, threshold {one.threshold}"
        settings.append(LiveSetting(name, FREE, "", loaded=loaded, policy=policy))
    warm_up(settings, examples, evaluation)
    decode_interleaved(settings, examples, evaluation)
    full, *rows = compare(settings, evaluation)
    quality = TASKS[evaluation.task].main_score
    measured = [beside(one, row, quality) for one, row in zip(tested, rows, strict=True)]
    return measured, full["seconds"]


def beside(one: Prediction, row: dict[str, Any], quality: str) -> dict[str, Any]:
    """A prediction beside what was measured."""
    doubts = [row["timing_doubt"], doubt_prediction(one.speedup, row["speedup"])]
    return one.as_row() | {
        "name": row["name"],
        "measured": row["speedup"],
        "measured_interval": row["speedup_interval"],
        "error": 100 * (one.speedup / row["speedup"] - 1),
        "measured_exit_share": row["exit_share"],
        "quality_share": row["quality_share"],
        quality: row[quality],
        "timing_doubt": ", ".join(filter(None, doubts)) or None,
    }


def write_choice(
    flags: ChooserArguments,
    cost: CostModel,
    predictions: list[Prediction],
    chosen: Prediction | None,
    rows: list[dict[str, Any]],
    doubts: str | None,
    context: dict[str, Any],
) -> None:
    """Write choice.json; print the best candidates of each layer and the comparison."""
    content = {
        "recommended": chosen and chosen.as_row(),
        "cost_seconds": asdict(cost),
        "predictions": [one.as_row() for one in predictions],
        "measured": rows,
        "untrusted_timing": doubts,
        "arguments": asdict(flags),
        "environment": context,
    }
    write_json(Path(flags.output_dir, "choice.json"), content)
    layers = sorted({one.shallow_layer for one in predictions})
    best = [
        recommend([one for one in predictions if one.shallow_layer == layer], flags.min_agreement)
        for layer in layers
    ]
    title = f"Fastest threshold of each layer with agreement >= {flags.min_agreement} (predicted)"
    parts = {name: f"{1e6 * seconds:.0f} us" for name, seconds in asdict(cost).items()}
    print_report(
        comparison_table(title, COLUMNS, [one.as_row() for one in best if one is not None]),
        comparison_table("Predicted and measured", MEASURED_COLUMNS, rows),
        "Cost: " + ", ".join(f"{name} {value}" for name, value in parts.items()),
        doubts or "",
    )
    if chosen is None:
        print(f"No candidate agrees in {flags.min_agreement:.0%} of tokens: lower --min_agreement.")
    else:
        print(f"--shallow_exit_layer {chosen.shallow_layer} --shallow2deep_conf_threshold {chosen.threshold}")
    print(json.dumps({"recommended": content["recommended"]}))


if __name__ == "__main__":
    main()
