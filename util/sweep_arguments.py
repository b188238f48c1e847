"""The flags of scripts/sweep.py. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from util.arguments import EXIT_ADAPTER_HELP
from util.flags import (
    Parser,
    as_flags,
    drop_repeats,
    flag,
    flags_in,
    list_flag,
    read_argument_file,
    refuse_flags_without,
    require,
    require_file,
    require_known,
    require_positive,
    require_unit_interval,
)
from util.methods import (
    BASELINE,
    CALM,
    FREE,
    FREE_ADAPTIVE,
    FREE_LOSSLESS,
    FREE_SHORTLIST,
    HF_GENERATE,
    STATIC,
    SWEPT,
)

FREES = (FREE, FREE_ADAPTIVE, FREE_LOSSLESS, FREE_SHORTLIST)
ON_CALM = (HF_GENERATE, STATIC, CALM)
OF_CALM = ("calm_methods", "calm_static_layers")  # flags of that checkpoint alone
PRESETS = {path.stem: path for path in Path(__file__).parents[1].glob("scripts/presets/*.yaml")}


@dataclass
class PresetArgument:
    preset: str | None = flag(None, "Flags to start from; those given override them.", tuple(sorted(PRESETS)))


@dataclass
class SweepArguments(PresetArgument):
    _argument_group_name = "Sweep"

    free: str | None = flag(None, "Checkpoint trained for FREE; decodes all methods but CALM.")
    exit_adapter_path: str | None = flag(None, f"{EXIT_ADAPTER_HELP} Behind --free.")
    calm: str | None = flag(None, "Checkpoint trained for CALM; decodes CALM and Static (default: --free's).")
    methods: list[str] = list_flag(SWEPT, f"Of {', '.join(SWEPT)}; {BASELINE} always runs.")
    static_layers: list[int] = list_flag(
        [], "Depths of Static (default: all but the last, or the exit adapter's).", method=STATIC
    )
    calm_methods: list[str] = list_flag([], "Those that --calm decodes, if others than --methods.")
    calm_static_layers: list[int] = list_flag(
        [], "Those on --calm, if others than --static_layers.", method=STATIC
    )
    shallow_layers: list[int] = list_flag([], "FREE's exits (default: the checkpoint's own).", method=FREES)
    free_thresholds: list[float] = list_flag(
        [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], "FREE's.", method=(FREE, FREE_SHORTLIST)
    )
    lossless_thresholds: list[float] = list_flag(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.7], "Those of FREE, lossless.", method=FREE_LOSSLESS
    )
    max_pending_tokens: int | None = flag(
        None, "FREE, lossless: run the deep layers once this many tokens wait.", method=FREE_LOSSLESS
    )
    lookup_tokens: list[int] = list_flag(
        [], f"Full depth, {FREE} and {FREE_LOSSLESS} also with lookups that propose so many tokens."
    )
    adapt_zetas: list[float] = list_flag(
        [0.4, 0.6, 0.8, 0.9], "Zetas of the adaptive threshold.", method=FREE_ADAPTIVE
    )
    calm_thresholds: list[float] = list_flag([0.3, 0.5, 0.7, 0.8, 0.9, 0.95], "CALM's.", method=CALM)
    exit_layers: list[int] = list_flag([], "CALM also with tests after these layers only.", method=CALM)
    conf_shortlist: str | None = flag(
        None, "File of scripts/learn_shortlist.py, for FREE shortlist.", method=FREE_SHORTLIST, file=True
    )
    batch_sizes: list[int] = list_flag([1], "Samples decoded together; every setting runs at each.")
    split: str = flag("test", "Which split is decoded.", ("validation", "test"))
    num_samples: int | None = flag(None, "Only the first samples.")
    trace_samples: int = flag(
        8, "Samples of each setting that are traced, for the report's heat maps.", changes_outputs=False
    )
    output_dir: str = flag("save/sweep", "Where results go.", changes_outputs=False)

    def __post_init__(self) -> None:
        drop_repeats(self)
        require(bool(self.free or self.calm), "Name a checkpoint with --free or --calm.")
        for name in ("methods", "calm_methods"):
            require_known(name, getattr(self, name), SWEPT)
        refuse_flags_without(
            self, self.methods + self.calm_methods, {name: f"{name} to --methods" for name in SWEPT}
        )
        require_positive("max_pending_tokens", self.max_pending_tokens)
        exits = self.exit_adapter_path is not None
        require(
            not (exits and self.free is None), "--exit_adapter_path stands behind --free: name that model."
        )
        require(
            not (exits and self.calm is None and CALM in self.methods),
            "--exit_adapter_path serves one exit, and CALM tests many: leave CALM out of --methods.",
        )
        if self.free is None:
            refuse_flags_without(self, (STATIC, CALM), dict.fromkeys(FREES, "--free CHECKPOINT"))
        self.refuse_methods_without_settings()
        for name in ("free_thresholds", "lossless_thresholds", "adapt_zetas", "calm_thresholds"):
            for value in getattr(self, name):
                require_unit_interval(name, value)
        require(min(self.lookup_tokens, default=1) > 0, "--lookup_tokens must be positive.")
        require(
            not self.lookup_tokens or self.batch_sizes == [1],
            "--lookup_tokens decodes one sequence at a time: leave --batch_sizes at 1.",
        )
        require_positive("num_samples", self.num_samples)
        require(bool(self.batch_sizes) and min(self.batch_sizes) > 0, "--batch_sizes must be positive.")
        largest = max(self.batch_sizes)
        require(
            all(largest % size == 0 for size in self.batch_sizes),
            f"--batch_sizes must divide the largest, {largest}: all settings decode the same blocks.",
        )
        require_file("conf_shortlist", self.conf_shortlist)

    def refuse_methods_without_settings(self) -> None:
        """Raise UserError for a method that was named and that no checkpoint would decode with."""
        for name in OF_CALM:
            fine = bool(self.calm) or not getattr(self, name)
            require(fine, f"--{name} has no effect here: add --calm CHECKPOINT.")
        wrong = [method for method in self.calm_methods if method not in ON_CALM]
        require(not wrong, f"--calm_methods: {', '.join(wrong)}: --free alone decodes so; leave it out.")
        fine = not self.calm_static_layers or STATIC in (self.calm_methods or self.methods)
        require(fine, f"--calm_static_layers has no effect here: add {STATIC} to --calm_methods.")
        if self.methods == [*SWEPT]:  # the default: whatever is possible
            return
        on_calm = {*(self.calm_methods or self.methods)} & {*ON_CALM} if self.calm else set()
        on_free = {*self.methods} - ({CALM} if self.calm else set()) if self.free else set()
        decoded = (on_calm | on_free) - (set() if self.conf_shortlist else {FREE_SHORTLIST})
        for method in (method for method in self.methods if method not in decoded):
            way = f"{method} to --calm_methods"
            if method in FREES:
                way = "--conf_shortlist FILE" if self.free else "--free CHECKPOINT"
            raise UserError(f"--methods: {method} has no setting here: leave it out, or add {way}.")


def expand_preset(argv: list[str]) -> list[str]:
    """Replace --preset by the flags of scripts/presets/NAME.yaml, before all others, which override them.

    Where --methods are given, what only other methods read is left out; and so are --calm's where that is "".
    """
    if {"-h", "--help"} & {*argv}:  # of all flags, not of this one
        return argv
    given, rest = Parser((PresetArgument,)).read(argv)
    if "preset" not in given:
        return rest
    settings = read_argument_file(PRESETS[given["preset"]])
    chosen, _ = Parser((SweepArguments,)).read(rest)
    if "methods" in chosen:
        methods = {*chosen["methods"], *chosen.get("calm_methods", ())}
        readers = {spec.name: spec.metadata["methods"] for spec in flags_in(SweepArguments)}
        idle = {name for name, who in readers.items() if who and not methods & {*who}}
        settings = {name: value for name, value in settings.items() if name not in {*idle, "calm_methods"}}
    if STATIC not in chosen.get("calm_methods", [STATIC]):
        settings.pop("calm_static_layers", None)
    if chosen.get("calm") == "":
        settings = {name: value for name, value in settings.items() if name not in OF_CALM}
    return [*as_flags(settings), *rest]
