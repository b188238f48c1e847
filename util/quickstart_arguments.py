"""The flags of scripts/quickstart_llm.py. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.choices import BACKENDS, MIXED, PRECISIONS
from util.backend_arguments import AUTOMATIC, BackendArguments
from util.flags import flag, list_flag, require, require_file, require_positive, require_unit_interval


@dataclass
class QuickstartArguments:
    _argument_group_name = "Quickstart"

    model: str | None = flag(
        None, "Decoder-only model: hub id, folder or .gguf file (default: SmolLM2-135M-Instruct)."
    )
    exit_adapter_path: str | None = flag(
        None, "A taught exit to show as well (default: the released one of SmolLM2; '' for none)."
    )
    data: Path | None = flag(None, "File of rows with dialogues to sum up (default: two of its own).")
    column: str = flag("dialogue", "The column of --data that holds them.")
    prompts: int = flag(4, "Dialogues and instructions in turn.")
    max_new_tokens: int = flag(32, "Tokens of an answer.")
    shallow_exit_layer: int | None = flag(None, "Exit of all methods (default: what is predicted fastest).")
    thresholds: list[float] = list_flag(
        [0.3, 0.5, 0.7, 0.9, 0.95], "Candidates for the confidence above which tokens exit."
    )
    min_agreement: float = flag(0.98, "Least share of tokens of a candidate that must equal full depth's.")

    def __post_init__(self) -> None:
        require_file("data", self.data)
        require_positive("prompts", self.prompts)
        require(self.max_new_tokens > 1, f"--max_new_tokens must be at least 2, got {self.max_new_tokens}.")
        require_positive("shallow_exit_layer", self.shallow_exit_layer)
        require(bool(self.thresholds), "--thresholds: name at least one.")
        require_unit_interval("min_agreement", self.min_agreement)
        for value in self.thresholds:
            require_unit_interval("thresholds", value)


@dataclass
class QuickstartBackendArguments(BackendArguments):
    """Those of all programs, with what is fastest on a CPU as default."""

    backend: str = flag("onnx", "What runs the layers, of our methods.", (AUTOMATIC, *BACKENDS))
    precision: str = flag(
        "",
        f"Of onnx's weights (default: {MIXED}; of other backends: fp32). Lossless decoding refuses w4.",
        PRECISIONS,
    )
    threads: int | None = flag(1, "CPU threads of every contestant.")

    def __post_init__(self) -> None:
        self.precision = self.precision or (MIXED if self.backend in (AUTOMATIC, "onnx") else "fp32")
        super().__post_init__()
