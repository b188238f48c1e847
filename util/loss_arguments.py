"""The flags of what a training minimises, and which weights it changes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from models.choices import ALL_LAYER_LOSSES, EXIT_CURRICULA, INTERMEDIATE_LOSSES, PER_EXIT_HEADS
from util.flags import flag, refuse_idle_flags, require, require_positive, require_unit_interval

LORA = "LoRA"  # the method of the adapters' flags


@dataclass
class LossArguments:
    _argument_group_name = "Losses at exits"

    output_hidden_states_decoder: bool = flag(
        False, "Train with losses at intermediate layers (implied by --intermediate_loss_fn)."
    )
    intermediate_loss_fn: str | None = flag(
        None, "Early-exit loss: which exits are trained, and how they are distilled.", INTERMEDIATE_LOSSES
    )
    e_scale: float = flag(1.0, "Scale of the intermediate layers' weights of sum_l (LayerSkip).")
    exit_curriculum: str | None = flag(
        None,
        "Which of all layers have a loss at a step (LayerSkip): some in turn, or from the last down, ever "
        "more in the first half of the training.",
        EXIT_CURRICULA,
    )
    rotation_interval: int = flag(8, "Of --exit_curriculum rotational: every so many layers at once.")
    layer_dropout: float = flag(
        0.0,
        "Chance that a sample skips the last decoder layer in training, that of others growing up to it "
        "exponentially (LayerSkip).",
    )
    shallow_loss_weight: float | None = flag(
        None, "Share of the shallow exit in the cross-entropy of shallowdeep_* (default: S / (S + L))."
    )
    distill_layer_alpha: float = flag(0.5, "Weight of the distillation loss of shallowdeep_kd_*.")
    do_layer_transformation: bool = flag(False, "Map shallow states linearly before they are distilled.")
    per_exit_head: str | None = flag(
        None, "Give each exit a norm, or a projection and a norm, of its own.", PER_EXIT_HEADS
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after this many evaluations without a better --metric_for_best_model."
    )
    paper_settings: bool = flag(False, "Start from the FREE paper's hyper-parameters for --dataset_name.")
    use_muon: bool = flag(False, "Train hidden matrices with Muon instead of AdamW (from scratch).")
    train_meta_cm_head: bool = flag(False, "Freeze the model and train the confidence head alone.")

    def __post_init__(self) -> None:
        if self.output_hidden_states_decoder and not self.train_meta_cm_head:
            require(
                self.intermediate_loss_fn is not None,
                "--output_hidden_states_decoder needs an --intermediate_loss_fn.",
            )
        require(self.distill_layer_alpha >= 0, "--distill_layer_alpha must not be negative.")
        require_unit_interval("shallow_loss_weight", self.shallow_loss_weight)
        require(
            self.shallow_loss_weight is None or (self.intermediate_loss_fn or "").startswith("shallowdeep_"),
            "--shallow_loss_weight needs --intermediate_loss_fn shallowdeep_*.",
        )
        require_unit_interval("layer_dropout", self.layer_dropout)
        require_unit_interval("e_scale", self.e_scale)
        require_positive("rotation_interval", self.rotation_interval)
        self._check_recipe()
        self._check_meta_head()
        require(
            self.per_exit_head is None or self.intermediate_loss_fn is not None,
            "--per_exit_head needs an --intermediate_loss_fn that trains it.",
        )
        distils = (self.intermediate_loss_fn or "").startswith("shallowdeep_kd")
        for name in ("do_layer_transformation", "distill_layer_alpha"):
            require(
                distils or getattr(self, name) == getattr(LossArguments, name),
                f"--{name} needs --intermediate_loss_fn shallowdeep_kd_{{last,unif,dyna}}.",
            )

    def _check_recipe(self) -> None:
        """LayerSkip's flags belong together."""
        require(
            self.e_scale == 1 or self.intermediate_loss_fn == "sum_l",
            "--e_scale needs --intermediate_loss_fn sum_l.",
        )
        require(
            self.exit_curriculum is None or self.intermediate_loss_fn in ALL_LAYER_LOSSES,
            f"--exit_curriculum needs --intermediate_loss_fn {', '.join(ALL_LAYER_LOSSES)}: others train one "
            "exit.",
        )
        require(
            self.rotation_interval == 8 or self.exit_curriculum == "rotational",
            "--rotation_interval needs --exit_curriculum rotational.",
        )

    def _check_meta_head(self) -> None:
        require(
            not (self.train_meta_cm_head and self.layer_dropout),
            "--train_meta_cm_head freezes the model: it contradicts --layer_dropout.",
        )
        require(
            not (self.train_meta_cm_head and self.intermediate_loss_fn),
            "--train_meta_cm_head freezes the model: it contradicts --intermediate_loss_fn.",
        )
        require(
            not (self.train_meta_cm_head and self.use_muon),
            "--use_muon is for training from scratch: it contradicts --train_meta_cm_head.",
        )


@dataclass
class LoraArguments:
    _argument_group_name = "LoRA"

    use_lora: bool = flag(
        False, "Train low-rank adapters (PEFT) and exit heads instead of all weights.", switches=LORA
    )
    lora_rank: int = flag(16, "Rank of the adapters.", method=LORA)
    lora_alpha: int = flag(32, "Their scale: the update is multiplied by alpha / rank.", method=LORA)
    lora_dropout: float = flag(0.05, "Dropout before the adapters.", method=LORA)
    lora_target_modules: list[str] | None = flag(
        None, "Names of the linear layers adapted (default: queries and values).", method=LORA
    )

    def __post_init__(self) -> None:
        require_positive("lora_rank", self.lora_rank)
        require_positive("lora_alpha", self.lora_alpha)
        require_unit_interval("lora_dropout", self.lora_dropout)
        refuse_idle_flags(self)
