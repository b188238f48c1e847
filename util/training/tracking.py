"""What trackers show of exits while a training evaluates: how often an exit agrees with the last layer, and
texts by depth.

Losses of each exit are in the Trainer's logs anyway, and so is what `LayerAgreement` counts; texts are no
figures, and go to those trackers that have tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from models.decoder_view import DecoderView
from models.exit_policy import ExitPolicy, FullDepth, StaticExit
from models.loading import LoadedModel
from models.losses import TOKENS_PER_CHUNK, LossTerms, TargetTokens, Total, normalized_state
from util.data.rows import Row
from util.evaluation.decode import decode_batch, describe_batch
from util.evaluation.records import EvaluationSettings
from util.tables import markdown_table

AGREEMENT_BATCHES = 16  # of an evaluation, the first ones: a share needs no more
SAMPLES = 4
TABLE = "samples_by_depth"
HAVE_TABLES = (TensorBoardCallback, WandbCallback, TrackioCallback)


class LayerAgreement:
    """Of a batch's target tokens, those at which exits predict what the last layer does.

    Called like an exit loss: `total` is the number of tokens, and each part that of an exit's agreements.
    They follow the reference's tokens, not the model's own, so that the share of an exit's drafts that
    lossless decoding accepts will be near theirs, not equal to it.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = list(layers)

    def __call__(self, view: DecoderView, outputs: Any, labels: Tensor, total: Total) -> LossTerms:
        tokens, states = TargetTokens.of(view.training_labels(labels)), view.training_states(outputs)

        def predict(layer: int) -> Tensor:
            chunks = tokens.select(normalized_state(view, states, layer)).split(TOKENS_PER_CHUNK)
            return torch.cat([view.project(chunk).argmax(-1) for chunk in chunks])  # (N,)

        last = predict(view.num_layers)
        agreements = {f"acceptance_layer_{layer}": (predict(layer) == last).sum() for layer in self.layers}
        return LossTerms(tokens.keep.sum(), agreements)


def taught_exits(view: DecoderView, shallow_layer: int | None, trains_exits: bool) -> list[int]:
    """The exits that a training is about: FREE's, or every layer but the last; none of plain fine-tuning."""
    if shallow_layer is not None:
        return [shallow_layer]
    return list(range(1, view.num_layers)) if trains_exits else []


def shown_depths(exits: list[int]) -> list[int]:
    """Three of many exits, evenly spread, the last among them."""
    return exits if len(exits) <= 3 else [exits[len(exits) * part // 3 - 1] for part in (1, 2, 3)]


class SampleTables(TrainerCallback):
    """At each evaluation, what the first rows come to at every depth shown, for trackers that have tables.

    `whole` is a context in which sharded weights are whole; `trackers` gives the callbacks of the training.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Dataset,
        settings: EvaluationSettings,
        exits: list[int],
        trackers: Callable[[], list[TrainerCallback]],
        whole: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.loaded, self.settings, self.trackers, self.whole = loaded, settings, trackers, whole
        self.rows = rows.select(range(min(SAMPLES, len(rows))))
        self.policies: dict[str, ExitPolicy] = {
            f"layer {layer}": StaticExit(layer) for layer in shown_depths(exits)
        }
        self.policies["full depth"] = FullDepth()

    def on_evaluate(
        self, args: Seq2SeqTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trackers = [callback for callback in self.trackers() if isinstance(callback, HAVE_TABLES)]
        if not trackers:
            return
        with self.whole():  # all processes come here, as weights may be sharded
            table = self.decode()
        if state.is_world_process_zero:
            for tracker in trackers:
                send_table(tracker, table, state.global_step)

    def decode(self) -> list[Row]:
        """One row a sample: source, reference and its text at every depth."""
        table = [
            {"source": row["source"], "reference": str(row.get("references") or row["target"])}
            for row in self.rows
        ]
        for name, policy in self.policies.items():
            decoded = decode_batch(self.loaded, policy, self.rows, self.settings)
            for row, record in zip(table, describe_batch(self.loaded, self.rows, decoded), strict=True):
                row[name] = record.prediction
        return table


def send_table(tracker: TrainerCallback, table: list[Row], step: int) -> None:
    """Add the table to what a tracker's run shows at this step; one that has no run yet shows none."""
    if isinstance(tracker, TensorBoardCallback):
        if tracker.tb_writer is not None:
            text = markdown_table(list(table[0]), [list(row.values()) for row in table])
            tracker.tb_writer.add_text(TABLE, text, step)
        return
    library = tracker._wandb if isinstance(tracker, WandbCallback) else tracker._trackio
    rows = [list(row.values()) for row in table]
    library.log({TABLE: library.Table(columns=list(table[0]), data=rows), "train/global_step": step})
