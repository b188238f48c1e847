"""EarlyExitTrainer: a Seq2SeqTrainer that minimises an exit loss and logs each of its parts.

`EarlyExitTrainer(..., exit_loss=build_exit_loss(...), exit_config=...)`; without an exit loss it minimises
its parent's. Over however many micro-batches and processes a batch is split up, the gradient is the whole's.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedModel, Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from models.decoder_view import DecoderView
from models.exit_heads import ExitConfig, load_exit_heads
from models.families import view_for
from models.lora import EXIT_HEADS_NAME, is_adapted, save_exit_heads
from models.losses import (
    ConfidenceHeadLoss,
    ExitLoss,
    Total,
    own_total,
    token_share,
    without_logits,
)
from util.training.tracking import AGREEMENT_BATCHES, LayerAgreement

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
AnyExitLoss = ExitLoss | ConfidenceHeadLoss


class EarlyExitTrainer(Seq2SeqTrainer):
    """Evaluations give, besides the loss, how often each of `exits` agrees with the last layer, and the
    figures of `score`."""

    loss_is_scaled_for_ga = True  # every micro-batch returns its share of the whole batch's loss

    def __init__(
        self,
        *args: Any,
        exit_loss: AnyExitLoss | None = None,
        exit_config: ExitConfig | None = None,
        score: Callable[[], dict[str, float]] | None = None,
        exits: Iterable[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # models of these families swallow the count of items
        self.exit_loss = exit_loss
        self.exit_config = exit_config
        self.score = score
        self.exits = list(exits)
        self.micro_batches: list[Batch] = []  # of the optimizer step to come
        self.totals: dict[str, Tensor] = {}  # what losses must know of all of them, if they are several
        self.loss_parts: dict[str, Tensor] = {}  # sums since the last log
        self.parts_of_step: set[str] = set()
        self.logged_steps: Counter[str] = Counter()  # with each part, of those before this since the last log

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        self.micro_batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.totals = {}
        self.logged_steps.update(self.parts_of_step)
        self.parts_of_step = set()
        if isinstance(self.exit_loss, ExitLoss):
            self.exit_loss.start_step(self.state.global_step, self.state.max_steps)
        return self.micro_batches, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs)
        if isinstance(self.exit_loss, ConfidenceHeadLoss):
            model.eval()  # the head has no dropout; the frozen model must predict as it will when deployed
        if len(self.micro_batches) > 1 and not self.totals:
            self.totals = self._survey_micro_batches(model)
        if self.exit_loss is None:
            share = token_share(self._view.training_labels(inputs["labels"]), self._total)
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            total = share * loss
        else:
            outputs = self._forward(self.exit_loss, model, inputs, self._total)
            total = outputs.pop("total")
            for name, value in outputs.items():
                self.loss_parts[name] = self.loss_parts.get(name, 0) + value.detach()
            self.parts_of_step |= set(outputs)
        total = total * self.accelerator.num_processes  # over which gradients are averaged
        return (total, outputs) if return_outputs else total

    @property
    def _view(self) -> DecoderView:
        return view_for(self.accelerator.unwrap_model(self.model))

    def _total(self, name: str, own: Tensor) -> Tensor:
        """Sum of a count over the micro-batches and processes of this optimizer step."""
        return self.totals[name] if self.totals else self.accelerator.reduce(own, "sum")

    def _survey_micro_batches(self, model: nn.Module) -> dict[str, Tensor]:
        """Sums over the whole batch; for a loss that must have seen its states, by a pass ahead of training's
        with the same dropout."""
        sums: dict[str, Tensor | int] = defaultdict(int)

        def add(name: str, own: Tensor) -> Tensor:
            sums[name] += own
            return own

        if self.exit_loss is not None and self.exit_loss.looks_around:
            with torch.no_grad(), fork_rng(self.args.device):
                for batch in self.micro_batches:
                    self._forward(self.exit_loss, model, self._prepare_inputs(batch), add)
        else:
            for batch in self.micro_batches:
                token_share(self._view.training_labels(batch["labels"].to(self.args.device)), add)
        return {name: self.accelerator.reduce(own, "sum") for name, own in sums.items()}

    def _forward(
        self, exit_loss: AnyExitLoss | LayerAgreement, model: nn.Module, inputs: Batch, total: Total
    ) -> dict[str, Tensor]:
        """The exit loss as `total` and its parts, computed in the forward pass: sharded weights are whole
        only there."""
        # Without labels the forward pass computes no loss of its own; the collator made decoder_input_ids.
        features = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        unwrapped = self.accelerator.unwrap_model(model)
        view = self._view

        def compute(module: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                terms = exit_loss(view, outputs, inputs["labels"], total)
            return {"total": terms.total, **terms.parts}

        handle = unwrapped.register_forward_hook(compute, prepend=True)  # before the weights are freed
        try:
            with without_logits(unwrapped):
                return dict(model(**features, output_hidden_states=True, use_cache=False))
        finally:
            handle.remove()

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop, for the loss; then agreement and `score`'s figures."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        figures = self.measure_agreement() if self.exits else {}
        if self.score is not None:
            with whole_weights(self.model):
                figures |= self.score()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    @torch.no_grad()
    def measure_agreement(self) -> dict[str, float]:
        """Of the target tokens of the first evaluation batches, the share at which an exit predicts what the
        last layer does."""
        self.model.eval()
        agreement, sums = LayerAgreement(self.exits), Counter[str]()
        for batch in islice(self.get_eval_dataloader(), AGREEMENT_BATCHES):
            counts = self._forward(agreement, self.model, self._prepare_inputs(batch), own_total)
            sums.update({name: self.accelerator.reduce(own, "sum").item() for name, own in counts.items()})
        tokens = sums.pop("total")
        return {name: sums[name] / tokens for name in sorted(sums)}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each part of the loss since the last log, over the steps that had it, to the
        training logs."""
        if "loss" in logs and self.loss_parts:
            sums = self.accelerator.reduce(torch.stack(list(self.loss_parts.values())), "sum").tolist()
            self.logged_steps.update(self.parts_of_step)
            means = {
                name: total / self.logged_steps[name]
                for name, total in zip(self.loss_parts, sums, strict=True)
            }
            logs = logs | means
            self.loss_parts.clear()
            self.parts_of_step = set()
            self.logged_steps.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if is_adapted(model) and self.args.should_save:
            save_exit_heads(model, output_dir or self.args.output_dir)
        if self.exit_config is not None and self.args.should_save:  # every process comes here, one writes
            self.exit_config.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_adapted_heads(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_adapted_heads(self.model, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights; a tied one is saved once, under one of its names."""
        missing = without_tied(load_result.missing_keys, self.model)
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


def load_adapted_heads(model: PreTrainedModel, checkpoint: str) -> None:
    """Load the exit heads that lie beside an adapter, if it has any."""
    heads = Path(checkpoint, EXIT_HEADS_NAME)
    if heads.is_file():
        load_exit_heads(model.get_base_model(), load_file(heads))


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Random numbers drawn inside are drawn again afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


def whole_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the weights that FSDP shards are whole."""
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model)
    return nullcontext()


def without_tied(missing: list[str], model: nn.Module) -> list[str]:
    """The names of missing weights, but for those that share their memory with one that is there."""
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    loaded = {place for name, place in places.items() if name not in missing}
    return [name for name in missing if places.get(name) not in loaded]


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest `checkpoint-<step>` that is whole; damaged ones are named in a warning and passed over."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name[11:]), reverse=True):
        damage = find_damage(folder)
        if damage is None:
            return str(folder)
        logger.warning("%s is damaged (%s): looking for an older checkpoint.", folder, damage)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Name of the first file of a checkpoint that is missing or cut off, if any."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf8"))  # written last
    except (OSError, ValueError):
        return "trainer_state.json"
    weights = [*checkpoint.glob("*.safetensors")]
    if not weights:
        return "no weights"
    saved_by_torch = [path for suffix in ("pt", "pth", "bin") for path in checkpoint.glob(f"*.{suffix}")]
    for path in [*weights, *saved_by_torch]:
        if not (reads_safetensors if path.suffix == ".safetensors" else reads_archive)(path):
            return path.name
    return None


def reads_safetensors(path: Path) -> bool:
    """Whether the header is whole and announces as many bytes as there are."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def reads_archive(path: Path) -> bool:
    """Whether a file of `torch.save` has all its parts, by their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
