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

from models.loading import load_model
from util.console import command
from util.files import locked_output_dir
from util.flags import parse_groups, require
from util.model_card import NAME, Card, describe_size, loss_curve, usage

ABOUT = """\
{size}, trained on short German-English package descriptions (`data/debian`, sources and targets
of at most 28 tokens). A demonstration of early exiting, not a translator for other text."""
TRAINING = """\
- Training: `bash {script}`: seed {seed}, {steps} steps, {epochs} epochs, starting from {origin}.
- Loss: `{loss}`, exit layer: {shallow}.
- Stored in bfloat16; decoded in float32."""
EXAMPLE = "Entwicklungsdateien für die Bibliothek"
METADATA = {
    "license": "apache-2.0",
    "language": ["de", "en"],
    "library_name": "transformers",
    "pipeline_tag": "translation",
}


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((ExportArguments,), __doc__, argv)
        with locked_output_dir(flags.output_dir):
            export(flags)


def export(flags: ExportArguments) -> None:
    """Write weights, tokenizer, exit settings and the card."""
    states = [read_state(folder) for folder in (*flags.earlier_runs, flags.run)]
    scores = "\n".join(score_rows(flags.sweep, flags.model)) if flags.sweep else ""
    loaded = load_model(str(flags.run))
    loaded.model.to(torch.bfloat16).save_pretrained(flags.output_dir)
    loaded.tokenizer.save_pretrained(flags.output_dir)
    loaded.exit_config.save(flags.output_dir)
    training = TRAINING.format(
        script=flags.train_script,
        origin=flags.origin,
        seed=torch.load(flags.run / "training_args.bin", weights_only=False).seed,
        steps=" + ".join(str(state["global_step"]) for state in states),
        epochs=" + ".join(f"{state['epoch']:.1f}" for state in states),
        loss=loaded.exit_config.intermediate_loss_fn,
        shallow=loaded.exit_config.shallow_exit_layer or "all",
    )
    use = usage(str(flags.output_dir), loaded, EXAMPLE)
    about = ABOUT.format(size=describe_size(loaded))
    card = Card(flags.title, METADATA, [about, training, loss_curve(states), scores, use])
    (flags.output_dir / NAME).write_text(card.render(), encoding="utf8")


def read_state(run: Path) -> dict[str, Any]:
    """The Trainer's account of a run; raises UserError if it did not end."""
    path = run / "trainer_state.json"
    require(path.is_file(), f"--run {run} is no finished training: there is no {path.name}.")
    return json.loads(path.read_text(encoding="utf8"))


def score_rows(sweep: Path, checkpoint: str) -> list[str]:
    """Test scores of each setting on this checkpoint, from a sweep; full depth comes first.

    Raises:
        UserError: the sweep is of other checkpoints.
    """
    content = json.loads((sweep / "sweep.json").read_text(encoding="utf8"))
    rows = [row for row in content["rows"] if row["checkpoint"] == checkpoint]
    require(bool(rows), f"--model {checkpoint}: {sweep} has no such checkpoint.")
    header = [
        f"Test split, {rows[0]['samples']} sentences (`scripts/sweep.py --preset quickstart` on it;",
        '"unseen" leaves out targets that also occur in train):',
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
