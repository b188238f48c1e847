"""The flags of scripts/benchmark_layer_skip.py. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.choices import BACKENDS
from util.backend_arguments import AUTOMATIC
from util.flags import flag, require, require_file, require_positive, require_unit_interval
from util.quickstart_arguments import QuickstartBackendArguments

HELD_OUT = 500  # rows that are not trained on


@dataclass
class LayerSkipArguments:
    _argument_group_name = "LayerSkip benchmark"

    output_dir: Path = flag(Path("save/layer-skip"), "Gets the model, or has it of an earlier call.")
    config_name: Path = flag(
        Path("scripts/configs/layer_skip_llama.json"), "Config of the Llama that is trained."
    )
    steps: int = flag(200, "Training steps of 16 rows: three minutes of one core.")
    days: int = flag(8, "Days that follow the one in a prompt: ten tokens each.")
    shallow_exit_layer: int = flag(2, "Exit of all methods.")
    threshold: float = flag(0.5, "Confidence above which tokens exit.")
    prompts: int = flag(24, "Days that no training row starts from.")
    batch_size: int = flag(4, "Prompts that are decoded together, after one by one.")

    def __post_init__(self) -> None:
        require_file("config_name", self.config_name)
        for name in ("steps", "days", "shallow_exit_layer", "batch_size"):
            require_positive(name, getattr(self, name))
        require(0 < self.prompts <= HELD_OUT, f"--prompts must lie in 1..{HELD_OUT}, got {self.prompts}.")
        require_unit_interval("threshold", self.threshold)


@dataclass
class LayerSkipBackendArguments(QuickstartBackendArguments):
    """Those of the quickstart, but by default what runs Hugging Face's methods."""

    backend: str = flag("torch", "What runs the layers, of our methods.", (AUTOMATIC, *BACKENDS))
