"""The flags of what runs a model, and where: for every program that decodes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.choices import BACKENDS, EXACT_PRECISIONS, EXIT_PRECISIONS, MIXED, PRECISIONS
from util.exit_arguments import ExitArguments
from util.flags import flag, require, require_positive

AUTOMATIC = "auto"


@dataclass
class BackendArguments:
    _argument_group_name = "Backend"

    backend: str = flag(
        AUTOMATIC,
        "What runs the layers of an evaluation: onnx is several times faster on a CPU; auto takes it where "
        "it can run the model (float32, on the CPU), else torch; compile is torch.compile.",
        (AUTOMATIC, *BACKENDS),
    )
    precision: str = flag(
        "fp32",
        "Of onnx's weights: fp32 decodes torch's tokens; w8 and w4 have 8 and 4 bits and a scale for each "
        "64 and 32 of them, int8 has 8 and one for a column: less precise, faster on sources and windows; "
        f"{MIXED} reads sources and prompts as int8 and decodes as w8. Lossless decoding refuses w4.",
        PRECISIONS,
    )
    exit_precision: str | None = flag(
        None,
        "Of an exit adapter's own weights (default: --precision): lossless decoding is as exact, and faster, "
        "where they have fewer bits.",
        EXIT_PRECISIONS,
    )
    threads: int | None = flag(None, "CPU threads (default: PyTorch's choice).")
    onnx_cache_dir: str | None = flag(
        None, "Where exported graphs are kept (default: ~/.cache/exitlm/onnx).", changes_outputs=False
    )

    def __post_init__(self) -> None:
        require_positive("threads", self.threads)
        require(
            self.precision == "fp32" or self.backend != "torch",
            f"--precision {self.precision} is for exported graphs: leave --backend torch out.",
        )
        require(
            self.exit_precision is None or self.backend in (AUTOMATIC, "onnx"),
            f"--exit_precision is for exported graphs: leave --backend {self.backend} out.",
        )

    def without_exit(self) -> BackendArguments:
        """These flags for a model that has no exit adapter, where another has."""
        return replace(self, exit_precision=None)

    def for_evaluation(self, exits: ExitArguments, num_beams: int) -> BackendArguments:
        """These flags, with the modules themselves where only they can decode so.

        Raises:
            UserError: another backend, or a precision that cannot, is asked for.
        """
        require(
            not exits.lossless or self.precision in EXACT_PRECISIONS,
            f"--lossless needs --precision {', '.join(EXACT_PRECISIONS)}: {self.precision} lets tokens "
            "of a window change each other.",
        )
        require(
            exits.lookup_tokens is None or bool(exits.methods) or self.precision in EXACT_PRECISIONS,
            f"--lookup_tokens at full depth needs --precision {', '.join(EXACT_PRECISIONS)}: "
            f"{self.precision} lets tokens of a window change each other.",
        )
        reasons = {
            "--num_beams": num_beams > 1,
            "--parallel_causal_mask False": not exits.parallel_causal_mask,
        }
        reason = next((flag for flag, holds in reasons.items() if holds), None)
        if reason is None:
            return self
        plain = self.backend in (AUTOMATIC, "torch") and self.precision == "fp32"
        require(plain, f"{reason} needs --backend torch and --precision fp32.")
        require(self.exit_precision is None, f"{reason} needs --backend torch: leave --exit_precision out.")
        return replace(self, backend="torch")
