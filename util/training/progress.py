"""Training in a log: a line with the time left at least every half minute, as long as steps are shorter.

On a terminal the Trainer's own bars do that.
"""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length

from util.progress import Progress, is_first_process, on_terminal


def progress_callbacks(training: Seq2SeqTrainingArguments) -> list[TrainerCallback]:
    """Nothing on a terminal; elsewhere lines instead of the Trainer's bars. Losses are printed anyway."""
    if on_terminal():
        return []
    training.disable_tqdm = True
    return [TrainingProgress()] if is_first_process() else []


class TrainingProgress(TrainerCallback):
    """Counts steps, and the batches of evaluations between them."""

    training: Progress  # from `on_train_begin` on

    def __init__(self) -> None:
        self.evaluation: Progress | None = None

    def on_train_begin(
        self,
        args: Seq2SeqTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.training = Progress("Training", state.max_steps, "step", state.global_step)

    def on_step_end(
        self, args: Seq2SeqTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training.update(state.global_step - self.training.done)
        self.training.report_if_due()

    def on_prediction_step(
        self,
        args: Seq2SeqTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if eval_dataloader is None or not has_length(eval_dataloader):
            return
        if self.evaluation is None:
            self.evaluation = Progress("Evaluation", len(eval_dataloader), "batch")
        self.evaluation.update()
        self.evaluation.report_if_due()

    def on_evaluate(
        self, args: Seq2SeqTrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluation = None
