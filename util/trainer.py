"""EarlyExitTrainer: a Seq2SeqTrainer that minimises an exit loss and logs each of its parts.

`EarlyExitTrainer(..., exit_loss=build_exit_loss(...), exit_config=...)`; without an exit loss it trains as
its parent does. Its evaluations generate with `exit_policy`, at full depth if there is none.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainer

from models.decoding import early_exit_decode
from models.exit_heads import ExitConfig, load_exit_heads
from models.exit_policy import ExitPolicy
from models.families import view_for
from models.lora import EXIT_HEADS_NAME, is_adapted, save_exit_heads
from models.losses import ConfidenceHeadLoss, ExitLoss, without_logits

logger = logging.getLogger(__name__)


class EarlyExitTrainer(Seq2SeqTrainer):
    loss_is_scaled_for_ga = False  # exit losses are per-batch means

    def __init__(
        self,
        *args: Any,
        exit_loss: ExitLoss | ConfidenceHeadLoss | None = None,
        exit_config: ExitConfig | None = None,
        exit_policy: ExitPolicy | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.exit_policy = exit_policy
        self.exit_loss = exit_loss
        self.exit_config = exit_config
        self.loss_parts: dict[str, list[Tensor]] = defaultdict(list)
        if exit_loss is None:
            self.loss_is_scaled_for_ga = None  # let the parent decide
        else:
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if self.exit_loss is None or not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(self.exit_loss, ConfidenceHeadLoss):
            model.eval()  # the head has no dropout; the frozen model must predict as it will when deployed
        # Without labels the forward pass computes no loss of its own; the collator made decoder_input_ids.
        features = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        unwrapped = self.accelerator.unwrap_model(model)
        with without_logits(unwrapped), self._loss_in_forward(unwrapped, inputs["labels"]):
            outputs = model(**features, output_hidden_states=True, use_cache=False)
        parts = dict(outputs)
        total = parts.pop("total")
        for name, value in parts.items():
            self.loss_parts[name].append(value)
        return (total, outputs) if return_outputs else total

    @contextmanager
    def _loss_in_forward(self, unwrapped: nn.Module, labels: Tensor) -> Iterator[None]:
        """Let forward passes return the loss and its parts: only inside them are sharded weights whole."""
        view = view_for(unwrapped)

        def compute(module: nn.Module, inputs: tuple, outputs: Any) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                terms = self.exit_loss(view, outputs, labels)
            return {"total": terms.total, **terms.parts}

        handle = unwrapped.register_forward_hook(compute, prepend=True)  # before the weights are freed
        try:
            yield
        finally:
            handle.remove()

    def evaluate(self, *args: Any, **gen_kwargs: Any) -> dict[str, float]:
        """Evaluate with the engine's loop, also in the middle of training; see Seq2SeqTrainer."""
        if gen_kwargs.get("num_beams", self.args.generation_num_beams) in (None, 1):
            engine = {"custom_generate": early_exit_decode, "exit_policy": self.exit_policy}
            gen_kwargs = engine | gen_kwargs
        return super().evaluate(*args, **gen_kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each part of the loss since the last log to the training logs."""
        if "loss" in logs:
            means = {name: torch.stack(values).mean().item() for name, values in self.loss_parts.items()}
            logs = {**logs, **means}
            self.loss_parts.clear()
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
        heads = Path(resume_from_checkpoint, EXIT_HEADS_NAME)
        if heads.is_file():
            load_exit_heads((model or self.model).get_base_model(), load_file(heads))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights; a tied one is saved once, under one of its names."""
        missing = without_tied(load_result.missing_keys, self.model)
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))


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
