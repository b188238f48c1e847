"""Model cards: the README.md of a model's folder, put together from sections.

    card = Card("My model", {"language": ["de", "en"]}, [describe_size(loaded), loss_curve([state])])
    write_card(folder, card)

A card that somebody wrote by hand stays as it is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from models.json_files import read_mapping
from models.loading import LoadedModel
from util.files import content_hash, file_hash, write_text
from util.policy_code import NAMES, evaluated_policy, exit_flags_of, trained_policy
from util.stages import STAGES
from util.tables import markdown_table

logger = logging.getLogger(__name__)

NAME = "README.md"
MARK = "<!-- Written from the files of this folder. Without this line, the card stays as it is. -->"
UNFILLED = "[More Information Needed]"  # in the card that comes with a LoRA adapter
RESULTS = {stage.split: stage.results for stage in STAGES.values()}
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
EXIT_LOSS = "ce_layer_"  # of logs, before the layer's number
POINTS = 10  # of a loss curve
STAMP = "model_files"  # of results: the weights that lay beside them
FIGURES = {  # of results, besides the scores: how they are called, and decimals
    "samples": ("samples", 0),
    "average_layers": ("decoder layers per token", 2),
    "exit_share": ("share of tokens that exit early", 3),
    "ideal_speedup": ("ideal speed-up", 2),
    "ms_per_token": ("ms per token", 1),
}
USAGE = """\
In a checkout of exitlm:

```python
from models import {names}

loaded = load_model({model!r})
inputs = loaded.tokenizer({text!r}, return_tensors="pt"{more})
output = loaded{loop}.generate(**inputs, {options}max_new_tokens=40)
print(loaded.tokenizer.decode(output[0], skip_special_tokens=True))
```"""


@dataclass
class Card:
    title: str
    metadata: dict[str, Any]  # of its YAML header; None is left out
    sections: list[str]  # Markdown; empty ones are left out

    def render(self) -> str:
        known = {name: value for name, value in self.metadata.items() if value}
        header = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, default_flow_style=None)
        parts = [f"---\n{header}---\n{MARK}", f"# {self.title}", *filter(None, self.sections)]
        return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write_card(folder: Path, card: Card) -> bool:
    """Write a folder's card, unless it has one of somebody's own or the same; whether it was written."""
    path, text = folder / NAME, card.render()
    if path.is_file():
        before = path.read_text(encoding="utf8")
        if before == text:
            return False
        if MARK not in before and UNFILLED not in before:
            logger.warning("%s stays as it is: it was not written by exitlm.", path)
            return False
    write_text(path, text)
    return True


# Sections


def describe_size(loaded: LoadedModel) -> str:
    """Parameters, layers, width and vocabulary, as the start of a sentence."""
    config = loaded.model.config
    millions = sum(weight.numel() for weight in loaded.model.parameters()) / 1e6
    size = f"{millions:.1f}M parameters, {describe_layers(loaded)}, width {config.hidden_size}"
    return f"{size}, a vocabulary of\n{config.vocab_size} pieces"


def describe_layers(loaded: LoadedModel) -> str:
    count, encoder = loaded.view.num_layers, loaded.model.config.num_hidden_layers
    if not loaded.model.config.is_encoder_decoder:
        return f"{count} layers"
    return f"{encoder} encoder and {count} decoder layers"


def loss_curve(states: list[dict[str, Any]]) -> str:
    """The training losses of runs, at most ten points each; empty where none was logged.

    `states`: of trainer_state.json.
    """
    rows = [row for state in states for row in curve_rows(state["log_history"])]
    headings = ["step", "training loss", "cross-entropy, shallow exit", "cross-entropy, last layer"]
    return markdown_table(headings, rows) if rows else ""


def curve_rows(history: list[dict[str, Any]]) -> list[list[str]]:
    """A run's training losses at up to ten points, the first and the last among them."""
    entries = [entry for entry in history if "loss" in entry]
    points = sorted({round(place) for place in np.linspace(0, len(entries) - 1, POINTS)}) if entries else []
    rows = []
    for entry in (entries[point] for point in points):
        parts = [f"{loss:.3f}" for loss in exit_losses(entry)]
        shallow, last = (parts[0], parts[-1]) if parts else ("", "")
        rows.append([str(entry["step"]), f"{entry['loss']:.3f}", shallow, last])
    return rows


def exit_losses(entry: dict[str, Any]) -> list[float]:
    """The cross-entropies of a logged step, the shallowest exit's first: trainer_state.json sorts its keys as
    texts, `ce_layer_24` before `ce_layer_6`."""
    names = [name for name in entry if name.startswith(EXIT_LOSS)]
    return [entry[name] for name in sorted(names, key=lambda name: int(name.removeprefix(EXIT_LOSS)))]


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """The figures of run.py's evaluations, by split; empty where there are none."""
    if not results:
        return ""
    scores = dict.fromkeys(name for found in results.values() for name in score_names(found))
    figures = {name: (name, 2) for name in scores} | FIGURES
    rows = []
    for name, (title, decimals) in figures.items():
        if any(name in found for found in results.values()):
            cells = [f"{found[name]:.{decimals}f}" if name in found else "" for found in results.values()]
            rows.append([title, *cells])
    settings = [f"- {split}: {describe_decoding(found)}" for split, found in results.items()]
    table = markdown_table(["", *results], rows)
    return "\n".join(["## Results", "", table, "", "Decoded by `run.py`:", "", *settings])


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """By split: what run.py wrote of the weights that lie in a folder; results of others are left out."""
    paths = {split: folder / name for split, name in RESULTS.items()}
    found = {split: read_mapping(path) for split, path in paths.items() if path.is_file()}
    weights = hash_weights(folder) if found else ""
    for split in [split for split, results in found.items() if results.get(STAMP) != weights]:
        logger.warning("%s is of other weights: it is left out of %s.", paths[split], NAME)
        del found[split]
    return found


def hash_weights(folder: Path) -> str:
    """Tells the weights in a folder, exits included, from others."""
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return content_hash([path.name, file_hash(path)] for path in files)


def score_names(results: dict[str, Any]) -> list[str]:
    """The task's scores, which stand before everything else."""
    names = list(results)
    return [name for name in names[: names.index("samples")] if isinstance(results[name], float)]


def describe_decoding(results: dict[str, Any]) -> str:
    given = {
        name: value if isinstance(value, list) else [value] for name, value in exit_flags_of(results).items()
    }
    words = " ".join(" ".join(map(str, [f"--{name}", *values])) for name, values in given.items())
    return f"{f'`{words}`' if words else 'full depth'}, batches of {results['batch_size']}"


def last_evaluated(folder: Path, results: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Of the results in a folder, those that were written last."""
    splits = sorted(results, key=lambda split: (folder / RESULTS[split]).stat().st_mtime_ns)
    return results[splits[-1]] if splits else None


def usage(
    model: str,
    loaded: LoadedModel,
    text: str,
    results: dict[str, Any] | None = None,
    chat: bool = False,
    policy: str | None = None,
) -> str:
    """A block of Python that loads `model` and decodes `text`, by a policy: an expression, by default the one
    that `results` were decoded with, or that the checkpoint was trained for. `chat`: the text has all special
    tokens."""
    caveat, beams = "", 1
    if policy is None and results is not None:
        policy, caveat = evaluated_policy(results)
        beams = results["arguments"].get("num_beams", 1)
    elif policy is None:
        policy = trained_policy(loaded.exit_config)
    names = sorted({"load_model", *(name for name in NAMES if f"{name}(" in policy)})
    options = f"exit_policy={policy}, " if policy else ""
    block = USAGE.format(
        names=", ".join(names),
        model=model,
        text=text,
        more=", add_special_tokens=False" if chat else "",
        loop=".model" if beams > 1 else "",  # Hugging Face's own, as in the evaluation
        options=f"num_beams={beams}, " if beams > 1 else options,
    )
    return "\n\n".join(filter(None, ["## Use", block, caveat]))
