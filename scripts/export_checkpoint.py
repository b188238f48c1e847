"""Turn a training run into a released checkpoint: bfloat16 weights, tokenizer, exit settings, model card.

python scripts/export_checkpoint.py --run save/debian-t5-free --output_dir checkpoints/debian-t5-free \
    --title "Debian De-En, T5, FREE" --train_script scripts/train_debian_t5_free.sh \
    --report save/quickstart/report.json --model free
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.loading import load_model

CARD = """\
---
license: apache-2.0
language: [de, en]
library_name: transformers
pipeline_tag: translation
---
# {title}

{parameters:.1f}M parameters, {layers} encoder and {layers} decoder layers, width {width}, a vocabulary of
{vocabulary} pieces, trained on short German-English package descriptions (`data/debian`, sources and targets
of at most 28 tokens). A demonstration of early exiting, not a translator for other text.

- Training: `bash {script}`: seed {seed}, {steps} steps, {epochs:.1f} epochs, starting from {origin}.
- Loss: `{loss}`, exit layer: {shallow}.
- Stored in bfloat16; decoded in float32.

| step | training loss | validation loss |
|---|---|---|
{curve}

{scores}
"""


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="--output_dir of a finished training run")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--title", required=True)
    parser.add_argument("--train_script", required=True)
    parser.add_argument("--origin", default="random weights", help="what the training started from")
    parser.add_argument("--report", type=Path, help="report.json of scripts/compare.py, for the scores")
    parser.add_argument("--model", help="the report's name of this checkpoint: free or calm")
    return parser.parse_args()


def main() -> None:
    flags = parse_flags()
    loaded = load_model(str(flags.run))
    loaded.model.to(torch.bfloat16).save_pretrained(flags.output_dir)
    loaded.tokenizer.save_pretrained(flags.output_dir)
    loaded.exit_config.save(flags.output_dir)
    state = json.loads((flags.run / "trainer_state.json").read_text(encoding="utf8"))
    config = loaded.model.config
    card = CARD.format(
        title=flags.title,
        parameters=sum(weight.numel() for weight in loaded.model.parameters()) / 1e6,
        layers=config.num_decoder_layers,
        width=config.d_model,
        vocabulary=config.vocab_size,
        script=flags.train_script,
        origin=flags.origin,
        seed=torch.load(flags.run / "training_args.bin", weights_only=False).seed,
        steps=state["global_step"],
        epochs=state["epoch"],
        loss=loaded.exit_config.intermediate_loss_fn,
        shallow=loaded.exit_config.shallow_exit_layer or "all",
        curve="\n".join(curve_rows(state["log_history"])),
        scores="\n".join(score_rows(flags)) if flags.report else "",
    )
    (flags.output_dir / "README.md").write_text(card.rstrip() + "\n", encoding="utf8")


def curve_rows(history: list[dict[str, Any]]) -> list[str]:
    """Training and validation loss at every evaluation."""
    rows, training_loss = [], None
    for entry in history:
        training_loss = entry.get("loss", training_loss)
        if "eval_loss" in entry and training_loss is not None:
            rows.append(f"| {entry['step']} | {training_loss:.3f} | {entry['eval_loss']:.3f} |")
    return rows


def score_rows(flags: argparse.Namespace) -> list[str]:
    """Test scores of each method on this checkpoint, from a comparison."""
    report = json.loads(flags.report.read_text(encoding="utf8"))
    rows = [row for row in report["rows"] if row["checkpoint"] == flags.model]
    header = [
        f'Test split, {rows[0]["samples"]} sentences (`bash scripts/quickstart.sh`; "unseen" leaves out',
        "targets that also occur in train):",
        "",
        "| method | BLEU | chrF | BLEU unseen | layers per token |",
        "|---|---|---|---|---|",
    ]
    return header + [
        f"| {row['method']} | {row['bleu']:.1f} | {row['chrf']:.1f} | {row['bleu_unseen']:.1f} "
        f"| {row.get('average_layers', report['rows'][1]['average_layers']):.2f} |"
        for row in rows
    ]


if __name__ == "__main__":
    main()
