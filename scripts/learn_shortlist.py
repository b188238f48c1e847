"""Learn a shortlist of the vocabulary for the confidence test: the most frequent target tokens of a split.

    python scripts/learn_shortlist.py --model_name_or_path checkpoints/debian-t5-free \
        --dataset_name debian_de_en --size 500 --output_file save/shortlist.json

The file serves `run.py --conf_shortlist`. It also says which share of the split's target tokens it covers
and, along full depth's outputs on the validation split, how its decisions differ from the full softmax's.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.backend_arguments import BackendArguments
from util.data_arguments import DataArguments, refuse_flags_of_run
from util.flag_help import answer_help
from util.script_arguments import ShortlistArguments

if __name__ == "__main__":
    answer_help((ShortlistArguments, DataArguments, BackendArguments), __doc__)  # before torch is imported

import torch
from datasets import Dataset
from torch import Tensor

from models.confidence import ShortlistGap, SoftmaxGap
from models.errors import UserError
from models.families import view_for
from models.loading import LoadedModel
from models.trace import trace_layers
from util.backend import limit_threads
from util.console import command
from util.data.encoding import encoder_for
from util.files import locked_output_file, write_json
from util.flags import parse_groups
from util.generate_options import greedy_options
from util.policies import require_exits
from util.progress import track
from util.setup import open_checkpoint, read_split
from util.tables import comparison_table, print_report

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
HOW_MANY = "all rows of --split are counted, and --num_samples compared"
COLUMNS = {
    "threshold": "threshold",
    "full_exits": "exits",
    "shortlist_exits": "exits, shortlist",
    "decisions_changed": "changed",
    "full_wrong_exits": "wrong exits",
    "shortlist_wrong_exits": "wrong exits, shortlist",
}


def main(argv: list[str] | None = None) -> None:
    with command():
        flags, data, backend = parse_groups(
            (ShortlistArguments, DataArguments, BackendArguments), __doc__, argv
        )
        refuse_flags_of_run(data, limits=HOW_MANY)
        limit_threads(backend)
        with locked_output_file(Path(flags.output_file)) as path:
            loaded = open_checkpoint(flags.model_name_or_path, data, backend)
            shortlist = learn_shortlist(loaded, read_split(data, flags.split, loaded), flags.size)
            shortlist["decisions"] = measure_decisions(flags, data, loaded, shortlist["token_ids"])
            write_json(path, shortlist)
        print(f"{len(shortlist['token_ids'])} tokens cover {shortlist['coverage']:.1%} of the targets")
        print_report(comparison_table("Decisions against the full softmax", COLUMNS, shortlist["decisions"]))
        print(f"Wrote {path}. Next: run.py or scripts/sweep.py with --conf_shortlist {path}")


def learn_shortlist(loaded: LoadedModel, examples: Dataset, size: int) -> dict[str, Any]:
    """The `size` most frequent target tokens (fewer if the split has fewer), by falling frequency."""
    texts = {name: list(examples[name]) for name in ("source", "target")}
    counts = Counter(token for row in encoder_for(loaded).targets(texts) for token in row)
    frequent = counts.most_common(size)
    coverage = sum(count for _, count in frequent) / counts.total()
    return {"token_ids": [token for token, _ in frequent], "coverage": coverage}


def measure_decisions(
    flags: ShortlistArguments, data: DataArguments, loaded: LoadedModel, token_ids: list[int]
) -> list[dict[str, float]]:
    """At each threshold: the share of tokens that would exit and, of all tokens, those that would wrongly."""
    layer = flags.shallow_layer or loaded.exit_config.shallow_exit_layer
    if layer is None:
        raise UserError(f"{flags.model_name_or_path} was not trained with an exit: name a --shallow_layer.")
    view = view_for(loaded.model)  # traces read the modules, whatever decodes
    require_exits("shallow_layer", [layer], view.num_layers)
    measures = (SoftmaxGap(), ShortlistGap(view, torch.tensor(token_ids)))
    confidences: list[list[Tensor]] = [[], []]
    agrees = []
    encoder = encoder_for(loaded, data.max_source_length)
    options = greedy_options(encoder.output_limit(data.val_max_target_length))
    sources = list(read_split(data, "validation", loaded, flags.num_samples)["source"])
    for source in track(sources, "Comparing", "sample"):
        inputs = encoder.inputs([source]).to(loaded.model.device)
        sequences = loaded.generate(**inputs, **options)
        for found, measure in zip(confidences, measures, strict=True):
            trace = trace_layers(loaded.model, **inputs, sequences=sequences, confidence=measure)
            found.append(trace.confidences[0, :, layer - 1])
        agrees.append(trace.agrees[0, :, layer - 1])
    full, short = (torch.cat(found).cpu().double() for found in confidences)  # as decoding compares them
    return [compare_decisions(full, short, torch.cat(agrees).cpu(), threshold) for threshold in THRESHOLDS]


def compare_decisions(full: Tensor, short: Tensor, agrees: Tensor, threshold: float) -> dict[str, float]:
    """Both measures' exits at one threshold, from the confidences (N,) of N tokens."""
    full_exits, short_exits = full > threshold, short > threshold
    return {
        "threshold": threshold,
        "full_exits": full_exits.float().mean().item(),
        "shortlist_exits": short_exits.float().mean().item(),
        "decisions_changed": (full_exits != short_exits).float().mean().item(),
        "full_wrong_exits": (full_exits & ~agrees).float().mean().item(),
        "shortlist_wrong_exits": (short_exits & ~agrees).float().mean().item(),
    }


if __name__ == "__main__":
    main()
