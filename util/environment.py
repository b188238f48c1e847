"""What a result depends on besides its arguments: recorded beside it."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from models.loading import LoadedModel


def environment(loaded: LoadedModel) -> dict[str, Any]:
    """Versions, and where and how the model runs."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git_hash(),
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "backend": loaded.backend,
        **loaded.precisions,
        "threads": torch.get_num_threads(),
    }


def git_hash() -> str | None:
    """Commit of this source tree; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
