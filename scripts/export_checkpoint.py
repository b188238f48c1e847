"""Turn a training run into a released checkpoint: bfloat16 weights, tokenizer, exit settings, model card.

python scripts/export_checkpoint.py --run save/debian-t5-free --output_dir checkpoints/debian-t5-free \
    --title "Debian De-En, T5, FREE" --train_script scripts/train_debian_t5_free.sh \
    --sweep save/quickstart --model free
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import ExportArguments

if __name__ == "__main__":
    answer_help((ExportArguments,), __doc__)  # before torch is imported

import torch

from models.json_files import check_fields, fits, read_mapping
from models.loading import load_model
from util.console import command
from util.files import locked_output_dir, write_text
from util.flags import parse_groups, require
from util.model_card import NAME, Card, describe_size, loss_curve, usage
from util.tables import markdown_table

ABOUT = """\
{size}, trained on short German-English package descriptions (`data/debian`, sources and targets
of at most 28 tokens). A demonstration of early exiting, not a translator for other text."""
TRAINING = """\
- Training: `bash {script}`: seed {seed}, {steps} steps, {epochs} epochs, starting from {origin}.
- Loss: `{loss}`, exit layer: {shallow}.
- Stored in bfloat16; decoded in float32."""
EXAMPLE = "Entwicklungsdateien für die Bibliothek"
SCORES = ("name", "checkpoint", "samples", "bleu", "chrf")
SHAPES: dict[str, Any] = {  # of a sweep's row
    "name": str,
    "checkpoint": str,
    "samples": int,
    "bleu": float,
    "chrf": float,
    "bleu_unseen": float | None,
    "average_layers": float | None,
}
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
    scores = score_table(flags.sweep, flags.model) if flags.sweep else ""
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
    write_text(flags.output_dir / NAME, card.render())


def read_state(run: Path) -> dict[str, Any]:
    """The Trainer's account of a run; raises UserError if it did not end."""
    path = run / "trainer_state.json"
    require(path.is_file(), f"--run {run} is no finished training: there is no {path.name}.")
    return read_mapping(path, "--run")


def score_table(sweep: Path, checkpoint: str) -> str:
    """Test scores of each setting on this checkpoint, from a sweep; full depth comes first.

    Raises:
        UserError: the sweep is of other checkpoints, or not of translations.
    """
    rows = [row for row in read_rows(sweep / "sweep.json") if row["checkpoint"] == checkpoint]
    require(bool(rows), f"--model {checkpoint}: {sweep} has no such checkpoint.")
    table = markdown_table(
        ["setting", "BLEU", "chrF", "BLEU unseen", "layers per token"],
        [
            [
                row["name"].removesuffix(f" ({checkpoint})"),
                f"{row['bleu']:.1f}",
                f"{row['chrf']:.1f}",
                show(row.get("bleu_unseen"), 1),
                show(row.get("average_layers", rows[0].get("average_layers")), 2),
            ]
            for row in rows
        ],
    )
    return (
        f"Test split, {rows[0]['samples']} sentences (`scripts/sweep.py --preset quickstart` on it;\n"
        f'"unseen" leaves out targets that also occur in train):\n\n{table}'
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a sweep.json; raises UserError if they lack what the card shows."""
    place = f"--sweep {path}"
    rows = read_mapping(path, "--sweep").get("rows")
    require(fits(rows, list[dict[str, Any]]), f"{place}: rows must be a list of objects.")
    for row in rows:
        missing = [name for name in SCORES if name not in row]
        require(not missing, f"{place} lacks {', '.join(missing)}: the card is one of a translation's sweep.")
        check_fields({name: row[name] for name in SHAPES if name in row}, SHAPES, place)
    return rows


def show(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


if __name__ == "__main__":
    main()
