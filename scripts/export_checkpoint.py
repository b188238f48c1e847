"""Turn a training run into a released checkpoint: bfloat16 weights, tokenizer, exit settings, model card.

python scripts/export_checkpoint.py --run save/debian-t5-free --output_dir checkpoints/debian-t5-free \
    --title "Debian De-En, T5, FREE" --train_script scripts/train_debian_t5_free.sh \
    --sweep save/quickstart --model free
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import ExportArguments

if __name__ == "__main__":
    answer_help((ExportArguments,), __doc__)  # before torch is imported

import torch

from models.errors import one_line_errors
from models.loading import LoadedModel, load_model
from util.files import locked_output_dir
from util.flags import parse_groups, require

CARD = """\
---
license: apache-2.0
language: [de, en]
library_name: transformers
pipeline_tag: translation
---
# {title}

{parameters:.1f}M parameters, {layers}, width {width}, a vocabulary of
{vocabulary} pieces, trained on short German-English package descriptions (`data/debian`, sources and targets
of at most 28 tokens). A demonstration of early exiting, not a translator for other text.

- Training: `bash {script}`: seed {seed}, {steps} steps, {epochs} epochs, starting from {origin}.
- Loss: `{loss}`, exit layer: {shallow}.
- Stored in bfloat16; decoded in float32.

| step | training loss | cross-entropy, shallow exit | cross-entropy, last layer |
|---|---|---|---|
{curve}

{scores}
"""


def main(argv: list[str] | None = None) -> None:
    with one_line_errors():
        (flags,) = parse_groups((ExportArguments,), __doc__, argv)
        with locked_output_dir(flags.output_dir):
            export(flags)


def export(flags: ExportArguments) -> None:
    """Write weights, tokenizer, exit settings and the card."""
    states = [read_state(folder) for folder in (*flags.earlier_runs, flags.run)]
    loaded = load_model(str(flags.run))
    loaded.model.to(torch.bfloat16).save_pretrained(flags.output_dir)
    loaded.tokenizer.save_pretrained(flags.output_dir)
    loaded.exit_config.save(flags.output_dir)
    config = loaded.model.config
    card = CARD.format(
        title=flags.title,
        parameters=sum(weight.numel() for weight in loaded.model.parameters()) / 1e6,
        layers=describe_layers(loaded),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        script=flags.train_script,
        origin=flags.origin,
        seed=torch.load(flags.run / "training_args.bin", weights_only=False).seed,
        steps=" + ".join(str(state["global_step"]) for state in states),
        epochs=" + ".join(f"{state['epoch']:.1f}" for state in states),
        loss=loaded.exit_config.intermediate_loss_fn,
        shallow=loaded.exit_config.shallow_exit_layer or "all",
        curve="\n".join(row for state in states for row in curve_rows(state["log_history"])),
        scores="\n".join(score_rows(flags.sweep, flags.model)) if flags.sweep else "",
    )
    (flags.output_dir / "README.md").write_text(card.rstrip() + "\n", encoding="utf8")


def describe_layers(loaded: LoadedModel) -> str:
    count = loaded.view.num_layers
    return (
        f"{count} encoder and {count} decoder layers"
        if loaded.model.config.is_encoder_decoder
        else f"{count} layers"
    )


def read_state(run: Path) -> dict[str, Any]:
    """The Trainer's account of a run; raises UserError if it did not end."""
    path = run / "trainer_state.json"
    require(path.is_file(), f"--run {run} is no finished training: there is no {path.name}.")
    return json.loads(path.read_text(encoding="utf8"))


def curve_rows(history: list[dict[str, Any]]) -> list[str]:
    """About ten points of a run's training losses."""
    entries = [entry for entry in history if "loss" in entry]
    rows = []
    for entry in entries[:: max(1, len(entries) // 10)]:
        parts = [value for name, value in entry.items() if name.startswith("ce_layer_")]
        rows.append(f"| {entry['step']} | {entry['loss']:.3f} | {parts[0]:.3f} | {parts[-1]:.3f} |")
    return rows


def score_rows(sweep: Path, checkpoint: str) -> list[str]:
    """Test scores of each setting on this checkpoint, from a sweep; full depth comes first."""
    content = json.loads((sweep / "sweep.json").read_text(encoding="utf8"))
    rows = [row for row in content["rows"] if row["checkpoint"] == checkpoint]
    header = [
        f'Test split, {rows[0]["samples"]} sentences (`bash scripts/quickstart.sh`; "unseen" leaves out',
        "targets that also occur in train):",
        "",
        "| setting | BLEU | chrF | BLEU unseen | layers per token |",
        "|---|---|---|---|---|",
    ]
    return header + [
        f"| {row['name'].removesuffix(f' ({checkpoint})')} | {row['bleu']:.1f} | {row['chrf']:.1f} "
        f"| {row['bleu_unseen']:.1f} | {row.get('average_layers', rows[0]['average_layers']):.2f} |"
        for row in rows
    ]


if __name__ == "__main__":
    main()
