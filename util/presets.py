"""Flags that a command line stands for without naming them: the paper's settings, those that train random
weights, and those that processes of torchrun need on a CPU. Given flags override them."""

from __future__ import annotations

import logging
import os
from typing import Any

from models.errors import UserError
from util.flags import as_flags
from util.tasks import DATASETS

SCRATCH_SETTINGS = {"learning_rate": 1e-3, "warmup_steps": 0.1, "logging_steps": 10}  # with --config_name

logger = logging.getLogger(__name__)


def expand_paper_settings(argv: list[str], dataset_name: str | None) -> list[str]:
    """Put the paper's hyper-parameters for a data set before the other flags."""
    record = DATASETS.get(dataset_name or "")
    if record is None or not record.training:
        raise UserError(f"--paper_settings: the paper has no data set {dataset_name!r}.")
    return as_flags(record.training) + argv


def expand_scratch_settings(argv: list[str], given: dict[str, Any]) -> list[str]:
    """Put what trains random weights before the flags of a run with --config_name, and say so. `given`: the
    values of these flags, by name.

    The Trainer's own defaults are for fine-tuning: its learning rate hardly moves random weights, and small
    runs end before the first line with a loss. The paper's settings stay as they are.
    """
    if not given.get("config_name") or given.get("paper_settings"):
        return argv
    chosen = {name: value for name, value in SCRATCH_SETTINGS.items() if name not in given}
    flags = as_flags(chosen)
    if flags and given.get("do_train"):
        logger.info("Random weights: training with %s, as no flags say otherwise.", " ".join(flags))
    return flags + argv


def launched_processes() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def cpu_launch_flags() -> list[str]:
    """What processes of torchrun need without GPUs in order to work together; given flags override it."""
    from util.device import best_device  # late: torch comes with it, and --help needs none

    has_gpus = best_device().type not in ("cpu", "mps")  # Apple's has no collectives
    if has_gpus or launched_processes() == 1 or "LOCAL_RANK" not in os.environ:
        return []
    return ["--use_cpu", "True", "--ddp_backend", "gloo"]
