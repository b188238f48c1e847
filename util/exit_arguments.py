"""The flags of early exits: which method decodes, and with what."""

from __future__ import annotations

from dataclasses import Field, dataclass
from typing import Any

from util.flags import (
    flag,
    flags_of,
    methods_on,
    refuse_idle_flags,
    require,
    require_file,
    require_not_negative,
    require_positive,
    require_unit_interval,
)
from util.methods import CALM, FREE, FREE_ADAPTIVE, STATIC

CONFIDENCE_TYPES = ("softmax", "meta")
METHODS = (STATIC, CALM, FREE)
TESTS = (CALM, FREE)  # those that test confidence


@dataclass
class ExitArguments:
    """Which tokens stop early. Layers count from 1; thresholds lie in [0, 1]."""

    _argument_group_name = "Early exits"

    deploy_scenario: bool = flag(
        False, "Measure latency: batch 1, one sample after the other.", changes_outputs=False
    )
    use_synchronize: bool = flag(True, "Wait for the accelerator at both ends of what is timed.")
    static_exit_layer: int | None = flag(
        None, "Static-Exiting: every token stops after this layer.", switches=STATIC
    )
    use_early_exit: bool = flag(
        False, "CALM: a token stops at the first layer that is confident enough.", switches=CALM
    )
    exit_conf_type: str = flag("softmax", "CALM's confidence measure.", CONFIDENCE_TYPES, method=CALM)
    exit_conf_threshold: float = flag(0.9, "CALM's threshold.", method=CALM, certifiable=False)
    exit_position_temp: float | None = flag(
        None, "CALM: the threshold decays with position, at this rate.", method=CALM
    )
    exit_decay_form: str = flag(
        "released",
        "CALM: the original code's decay, or the one of the CALM paper.",
        ("released", "paper"),
        method=CALM,
    )
    exit_min_layer: int | None = flag(None, "CALM: no exit before this layer.", method=CALM)
    exit_layers: list[int] | None = flag(
        None, "CALM: the only layers after which a token may stop (default: all).", method=CALM
    )
    conf_shortlist: str | None = flag(
        None,
        "Measure softmax confidence over the tokens of this file alone: see scripts/learn_shortlist.py.",
        method=TESTS,
        file=True,
    )
    use_shallow_deep: bool = flag(
        False, "FREE: a token stops at --shallow_exit_layer or runs all layers.", switches=FREE
    )
    shallow_exit_layer: int | None = flag(
        None,
        "FREE's only exit (default at evaluation: the checkpoint's own).",
        method=FREE,
        always=True,  # training reads it
    )
    shallow2deep_conf_type: str = flag("softmax", "FREE's confidence measure.", CONFIDENCE_TYPES, method=FREE)
    shallow2deep_conf_threshold: float = flag(
        0.9, "FREE's threshold, or the adaptive one's first value.", method=FREE, certifiable=False
    )
    parallel_gen_token: bool = flag(
        True, "FREE: synchronized parallel decoding of the skipped tokens.", method=FREE
    )
    copy_skipped_hidden_states: bool = flag(
        False, "FREE: copy states as CALM does, instead of catching up.", method=FREE
    )
    parallel_causal_mask: bool = flag(
        True, "FREE: tokens of one parallel pass see only earlier ones.", method=FREE
    )
    rollback_conf_threshold: float | None = flag(
        None,
        "FREE: undo a shallow token whose cross-entropy under the deep model exceeds this.",
        method=FREE,
    )
    lossless: bool = flag(
        False,
        "FREE: verify shallow tokens in the parallel pass, so that output equals full depth's.",
        method=FREE,
        certifiable=False,
    )
    max_pending_tokens: int | None = flag(
        None, "FREE: run the deep layers once this many tokens wait.", method=FREE
    )
    lookup_tokens: int | None = flag(
        None,
        "FREE, full depth: propose up to so many tokens that followed the newest ones earlier in the text, "
        "for the parallel pass to verify; a fixed threshold then decodes as without.",
    )
    auto_exit: bool = flag(
        False,
        "FREE: choose threshold and cap from the first requests, and follow what later ones accept.",
        method=FREE,
        certifiable=False,
    )
    use_adapt_threshold: bool = flag(
        False,
        "FREE: fit the threshold to the parallel passes (beta mixture).",
        method=FREE,
        switches=FREE_ADAPTIVE,
        certifiable=False,
    )
    adapt_threshold_file: str | None = flag(
        None,
        "FREE: continue from the adaptive_threshold.json of an earlier evaluation (--do_predict: "
        "adaptive_threshold_test.json).",
        method=FREE_ADAPTIVE,
        file=True,
    )
    adapt_zeta: float = flag(
        0.4, "FREE: how probably right an exit must be under the adaptive threshold.", method=FREE_ADAPTIVE
    )
    calibrated_threshold_file: str | None = flag(
        None,
        "Use the threshold that scripts/calibrate.py certified for this model and these settings.",
        method=TESTS,
        file=True,
        certifiable=False,
    )

    def __post_init__(self) -> None:
        require(len(self.methods) <= 1, f"{' and '.join(self.methods)} contradict: choose one method.")
        for name in ("exit_conf_threshold", "shallow2deep_conf_threshold", "adapt_zeta"):
            require_unit_interval(name, getattr(self, name))
        for name in ("static_exit_layer", "shallow_exit_layer", "exit_min_layer", "exit_position_temp"):
            require_positive(name, getattr(self, name))
        require_positive("max_pending_tokens", self.max_pending_tokens)
        require_positive("lookup_tokens", self.lookup_tokens)
        require_not_negative("rollback_conf_threshold", self.rollback_conf_threshold)
        refuse_idle_flags(self)
        for name in ("conf_shortlist", "adapt_threshold_file", "calibrated_threshold_file"):
            require_file(name, getattr(self, name))
        self._check_calibration()
        self._check_measure()
        self._check_verification()
        self._check_auto_exit()
        self._check_catching_up()

    @property
    def method(self) -> str | None:
        """Static, CALM or FREE; None decodes at full depth."""
        return next((name for name in methods_on(self) if name in METHODS), None)

    @property
    def methods(self) -> list[str]:
        """The flags, of those that name a method, that are set."""
        return [f"--{name}" for method, name in methods_on(self).items() if method in METHODS]

    def _check_measure(self) -> None:
        require(
            self.exit_layers is None or self.exit_min_layer is None,
            "--exit_layers and --exit_min_layer contradict: choose one.",
        )
        require(
            self.exit_decay_form == "released" or self.exit_position_temp is not None,
            f"--exit_decay_form {self.exit_decay_form} has no effect here: add --exit_position_temp.",
        )
        kind = self.exit_conf_type if self.use_early_exit else self.shallow2deep_conf_type
        require(
            self.conf_shortlist is None or kind == "softmax",
            "--conf_shortlist needs the confidence type softmax.",
        )

    def _check_calibration(self) -> None:
        """A threshold may repeat the certified one; what else no certificate covers is refused."""
        found = [f"--{spec.name}" for spec in self.uncertified() if getattr(self, spec.name) is True]
        require(
            self.calibrated_threshold_file is None or not found,
            f"--calibrated_threshold_file contradicts {' and '.join(found)}.",
        )

    def uncertified(self) -> list[Field[Any]]:
        """The flags of the method in use that a calibration chooses or that no certificate covers."""
        return [spec for spec in flags_of(self, self.method) if not spec.metadata["certifiable"]]

    def certified(self) -> dict[str, Any]:
        """The settings of the method in use for which alone a calibrated threshold holds."""
        return {
            spec.name: getattr(self, spec.name)
            for spec in flags_of(self, self.method)
            if spec.metadata["certifiable"] and spec.metadata["changes_outputs"]
        }

    def _against_verification(self) -> dict[str, bool]:
        """By flag: whether the parallel pass is prevented from saying what full depth says."""
        return {
            "--copy_skipped_hidden_states": self.copy_skipped_hidden_states,
            "--rollback_conf_threshold": self.rollback_conf_threshold is not None,
            "--parallel_causal_mask False": not self.parallel_causal_mask,
        }

    def _check_verification(self) -> None:
        """Lossless decoding and lookups have the parallel pass verify."""
        found = [name for name, given in self._against_verification().items() if given]
        require(not (self.lossless and found), f"--lossless contradicts {' and '.join(found)}.")
        looks_up = self.lookup_tokens is not None
        require(
            not looks_up or self.method in (None, FREE),
            f"--lookup_tokens is for FREE or full depth: leave out {' '.join(self.methods)}.",
        )
        require(not (looks_up and found), f"--lookup_tokens contradicts {' and '.join(found)}.")

    def _check_auto_exit(self) -> None:
        """What --auto_exit chooses is not to be given, nor what it cannot rate."""
        default = ExitArguments.shallow2deep_conf_threshold
        settled = self._against_verification() | {
            "--use_adapt_threshold": self.use_adapt_threshold,
            "--max_pending_tokens": self.max_pending_tokens is not None,
            "--lookup_tokens": self.lookup_tokens is not None,
            "--shallow2deep_conf_threshold": self.shallow2deep_conf_threshold != default,
            "--calibrated_threshold_file": self.calibrated_threshold_file is not None,
        }
        found = [name for name, given in settled.items() if given]
        require(not (self.auto_exit and found), f"--auto_exit contradicts {' and '.join(found)}.")

    def _check_catching_up(self) -> None:
        """Skipped tokens get their deep keys/values in one way."""
        require(
            self.parallel_gen_token or self.copy_skipped_hidden_states,
            "--parallel_gen_token False needs --copy_skipped_hidden_states True: skipped tokens would have "
            "no deep keys/values.",
        )
        require(
            not (self.copy_skipped_hidden_states and self.rollback_conf_threshold is not None),
            "--rollback_conf_threshold needs the parallel pass that --copy_skipped_hidden_states removes.",
        )
