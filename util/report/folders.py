"""Read result folders: those of `run.py`, of `scripts/sweep.py` and of `gpt_eval`.

    results = read_folders(["save/sweep", "save/free", "save/judge"])

A folder is recognised by its files; files that are not there leave their fields empty. What cannot be read
raises a UserError that names the file and the line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from models.errors import UserError
from models.json_files import check_fields, fits, read_mapping
from util.data_arguments import LIMITS
from util.evaluation.records import SETTING_COLUMNS, Record, Trace, best_windows, read_records
from util.exit_arguments import ExitArguments
from util.files import read_json_lines
from util.flags import flags_in
from util.methods import BASELINE, CALM, FREE, FREE_ADAPTIVE, FREE_LOSSLESS, HF_GENERATE, STATIC, with_lookup
from util.report.results import JudgeScores, Results, ResultSet, SettingResults
from util.stages import STAGES, Stage
from util.tasks import TASKS

Line = TypeVar("Line")
EXPECTED = (
    "eval_results.json or predict_results.json (of run.py), settings.json with records.jsonl or sweep.json "
    "(of scripts/sweep.py), or scores.json (of gpt_eval)"
)
FIGURE_KEYS = (
    "quality_share",
    "speedup",
    "ideal_speedup",
    "real_over_ideal",
    "tokens_per_second",
    "ms_per_token",
    "seconds_per_sample_median",
    "average_layers",
    "exit_share",
)
TIME_RATIOS = ("speedup", "speedup_interval", "speedup_median", "real_over_ideal", "timing_doubt")
SHAPES = {  # of what is read from any of the files
    "settings": list[Any],
    "rows": list[Any],
    "judges": dict[str, Any],
    "agreement": list[dict[str, Any]],
    "likert": dict[str, Any],
    "pairwise": dict[str, Any],
    "answers": dict[str, int],
    "arguments": dict[str, Any],
    "environment": dict[str, Any],
    "confidence_intervals": dict[str, Any],
    "auc": dict[str, float | None] | None,
    "fastest_99": dict[str, str | None] | None,
    "pareto": list[str] | None,
    "name": str,
    "method": str,
    "checkpoint": str,
    "main_score": str,
    "dataset": str | None,
    "split": str | None,
    "samples": int,
    "batch_size": int,
    "num_layers": int,
    "shallow_layer": int | None,
    "threshold": float | None,
    "zeta": float | None,
}
THRESHOLDS = {"use_early_exit": "exit_conf_threshold", "use_shallow_deep": "shallow2deep_conf_threshold"}
SAME_ENVIRONMENT = ("dtype", "backend", "precision")
APART = {  # arguments in which runs of the same model on the same samples may differ
    *(spec.name for spec in flags_in(ExitArguments)),
    "exit_adapter_path",
    "exit_precision",
    *("train_file", "validation_file", "test_file", "data_dir"),  # what is in them is compared
    *LIMITS,
    *("backend", "precision"),  # the environment says which it was
    "threads",  # of which time depends
}
INTERVAL_KEYS = ("interval", "quality_share_interval", "speedup_interval")


def read_folders(folders: Sequence[str | Path]) -> Results:
    """Read all folders; settings of different folders get distinct names, single runs are compared.

    Raises:
        UserError: a folder holds no results, or a file cannot be read.
    """
    results = Results()
    paths = list(dict.fromkeys(map(Path, folders)))
    for path, label in zip(paths, distinct_labels(paths), strict=True):
        found = read_folder(path, label)
        results.sets += found.sets
        results.judges += found.judges
    compare_runs([result for result in results.sets if result.kind == "run"])
    make_names_distinct(results.sets)
    return results


def distinct_labels(paths: list[Path]) -> list[str]:
    """Folder names; whole paths where names are shared."""
    counts = Counter(path.resolve().name for path in paths)
    return [str(path) if counts[path.resolve().name] > 1 else path.resolve().name for path in paths]


def make_names_distinct(sets: list[ResultSet]) -> None:
    """Put the folder before names that several folders use."""
    counts = Counter(setting.name for result in sets for setting in result.settings)
    for result in sets:
        names = {
            setting.name: f"{result.label}: {setting.name}" if counts[setting.name] > 1 else setting.name
            for setting in result.settings
        }
        for setting in result.settings:
            setting.name = names[setting.name]
        result.pareto = [names[name] for name in result.pareto]
        result.fastest_99 = {
            method: None if name is None else names[name] for method, name in result.fastest_99.items()
        }


def read_folder(folder: Path, label: str) -> Results:
    results = Results()
    if (folder / "settings.json").is_file() and any(
        (folder / name).is_file() for name in ("records.jsonl", "sweep.json")
    ):
        results.sets.append(read_sweep(folder, label))
    stages = {name: stage for name, stage in STAGES.items() if (folder / stage.results).is_file()}
    for name, stage in stages.items():
        results.sets.append(read_run(folder, stage, f"{label} ({name})" if len(stages) > 1 else label))
    if (folder / "scores.json").is_file():
        path = folder / "scores.json"
        scores = read_object(path, ("judges",))
        for judge, entry in scores["judges"].items():
            check_keys(entry, (), f"{path}, judge {judge!r}")
        results.judges.append(JudgeScores(label, scores))
    if not results.sets and not results.judges:
        raise UserError(f"{folder}: no results here; expected {EXPECTED}.")
    return results


# A sweep


def read_sweep(folder: Path, label: str) -> ResultSet:
    path = folder / "settings.json"
    content = read_object(path, ("settings", "dataset", "split", "main_score", "samples"))
    settings = {}
    for entry in content["settings"]:
        check_keys(entry, [name for name in SETTING_COLUMNS if name != "zeta"], str(path))  # once unrecorded
        settings[entry["name"]] = SettingResults.from_row(entry, str(path))
    for place, record in lines_of(folder / "records.jsonl", read_records):
        setting = known_setting(settings, record.setting, place)
        check_place(record, setting, place)
        setting.records.append(record)
    for place, row in lines_of(folder / "traces.jsonl", read_json_lines):
        setting = known_setting(settings, row.get("setting"), place)
        trace = Trace.from_row(row, setting.depth, place)
        check_place(trace, setting, place)
        setting.traces[trace.row] = trace
    result = ResultSet(
        label=label,
        kind="sweep",
        dataset=content["dataset"],
        split=content["split"],
        main_score=content["main_score"],
        samples=content["samples"],
        settings=list(settings.values()),
        arguments=content.get("arguments", {}),
        environment=content.get("environment", {}),
        interleaved=content.get("interleaved") is True,
    )
    if (folder / "sweep.json").is_file():
        add_figures(result, settings, folder / "sweep.json")
    return result


def add_figures(result: ResultSet, settings: dict[str, SettingResults], path: Path) -> None:
    """Read sweep.json; what compares times is left out where settings did not take turns."""
    content = read_object(path, ("rows",))
    for row in content["rows"]:
        check_keys(row, ("name",), str(path))
        check_figures(row, result.main_score, str(path))
        compared = row if result.interleaved else drop_time_ratios(row)
        known_setting(settings, row["name"], str(path)).figures = compared
    pareto, fastest = content.get("pareto") or [], content.get("fastest_99") or {}
    for name in [*pareto, *filter(None, fastest.values())]:
        known_setting(settings, name, str(path))
    if result.interleaved:
        result.auc, result.fastest_99, result.pareto = content.get("auc") or {}, fastest, pareto


def known_setting(settings: dict[str, SettingResults], name: Any, place: str) -> SettingResults:
    if not isinstance(name, str) or name not in settings:
        raise UserError(f"{place}: setting {name!r} is not in settings.json.")
    return settings[name]


def check_place(found: Record | Trace, setting: SettingResults, place: str) -> None:
    """Raise UserError unless a record or trace has a row, and exits among the setting's layers."""
    if found.row is None:
        raise UserError(f"{place}: lacks row.")
    if not all(layer in range(1, setting.depth + 1) for layer in found.exit_layers or ()):
        raise UserError(f"{place}: exit_layers must lie in 1..{setting.num_layers}.")


# A run


def read_run(folder: Path, stage: Stage, label: str) -> ResultSet:
    """One evaluation as a result set of one setting, named after its folder."""
    path = folder / stage.results
    figures = read_object(path, ("samples", "batch_size", "arguments"))
    arguments = figures["arguments"]
    main_score = find_main_score(figures, arguments, str(path))
    check_figures(figures, main_score, str(path))
    records = read_predictions(folder / stage.predictions, figures["samples"], path)
    setting = SettingResults(
        name=label,
        method=name_method(arguments, figures),
        checkpoint=Path(arguments.get("model_name_or_path") or "").name,
        threshold=find_threshold(arguments),
        zeta=find_zeta(arguments),
        shallow_layer=arguments.get("shallow_exit_layer") or arguments.get("static_exit_layer"),
        batch_size=figures["batch_size"],
        num_layers=count_layers(records, figures["batch_size"]),
        figures={key: value for key, value in figures.items() if not isinstance(value, dict)},
        records=records,
    )
    setting.figures["interval"] = figures.get("confidence_intervals", {}).get(main_score)
    return ResultSet(
        label=label,
        kind="run",
        dataset=arguments.get("dataset_name") or arguments.get(f"{stage.split}_file"),
        split=stage.split,
        main_score=main_score,
        samples=figures["samples"],
        settings=[setting],
        arguments=arguments,
        environment=figures.get("environment", {}),
    )


def read_predictions(path: Path, samples: int, results: Path) -> list[Record]:
    """A run's records, if there are any; UserError if the file `results` is of another number of samples."""
    records = [record for _, record in lines_of(path, read_records)]
    found = len(best_windows(records))
    if path.is_file() and found != samples:
        raise UserError(
            f"{results} is of {samples} samples, {path.name} beside it of {found}: finish the evaluation "
            "with run.py --resume_eval True."
        )
    for row, record in enumerate(records):
        record.row = row
    return records


def find_main_score(figures: dict[str, Any], arguments: dict[str, Any], place: str) -> str:
    """The main score of the task; where the arguments do not name it, of the task whose score is there."""
    task = arguments.get("task")
    if task in TASKS:
        return TASKS[task].main_score
    for record in TASKS.values():
        if record.main_score in figures:
            return record.main_score
    raise UserError(f"{place}: no score of {', '.join(TASKS)}.")


def name_method(arguments: dict[str, Any], figures: dict[str, Any]) -> str:
    """The method that the flags of a run switch on."""
    if "average_layers" not in figures:
        return HF_GENERATE
    if arguments.get("use_early_exit"):
        return CALM
    method = STATIC if arguments.get("static_exit_layer") else BASELINE
    if arguments.get("use_shallow_deep"):
        method = FREE_ADAPTIVE if arguments.get("use_adapt_threshold") else FREE
        method = FREE_LOSSLESS if arguments.get("lossless") else method
    return with_lookup(method, arguments.get("lookup_tokens"))


def find_threshold(arguments: dict[str, Any]) -> float | None:
    """The threshold of a run's method, where a flag or its default says it."""
    switch = next((name for name in THRESHOLDS if arguments.get(name)), None)
    if switch is None or arguments.get("auto_exit"):
        return None
    return arguments.get(THRESHOLDS[switch], getattr(ExitArguments, THRESHOLDS[switch]))


def find_zeta(arguments: dict[str, Any]) -> float | None:
    """The zeta of a run's adaptive threshold, where it had one."""
    if not arguments.get("use_adapt_threshold"):
        return None
    return arguments.get("adapt_zeta", ExitArguments.adapt_zeta)


def count_layers(records: list[Record], batch_size: int) -> int | None:
    """The decoder's layers: `full_layer_calls` is their number times the steps, shared by the first batch."""
    batch = records[:batch_size]
    steps = max((len(record.exit_layers or ()) for record in batch), default=0)
    return round(batch[0].full_layer_calls * len(batch) / steps) or None if steps else None


def compare_runs(runs: list[ResultSet]) -> None:
    """Relate each run's quality to that of one at full depth on the same samples, if there is one.

    Their times are not related: a run that was timed at another hour, on a busier machine, tells nothing of
    the method.
    """
    for run in runs:
        ours = run.settings[0]
        for other in runs:
            baseline = other.settings[0]
            if baseline.method == BASELINE and is_comparable(run, other):
                quality = baseline.figures[run.main_score]
                score = ours.figures[run.main_score]
                ours.figures["quality_share"] = 100 * score / quality if quality else None
                run.baseline = baseline
                break


def is_comparable(run: ResultSet, other: ResultSet) -> bool:
    """Whether only the method differs: same weights, samples, lengths, prompts, backend and precision."""

    def identity(result: ResultSet) -> list[Any]:
        samples = [(record.id, record.source, record.reference) for record in result.settings[0].records]
        arguments = {name: value for name, value in result.arguments.items() if name not in APART}
        return [arguments, [result.environment.get(name) for name in SAME_ENVIRONMENT], samples]

    return bool(run.settings[0].records) and identity(run) == identity(other)


# Files


def read_object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON file with an object that has these keys."""
    content = read_mapping(path)
    check_keys(content, keys, str(path))
    return content


def lines_of(path: Path, read: Callable[[Path], Iterator[Line]]) -> Iterator[Line]:
    """What `read` finds in a file; nothing if there is no such file."""
    return read(path) if path.is_file() else iter(())


def drop_time_ratios(row: dict[str, Any]) -> dict[str, Any]:
    """A row of figures without those that compare times: not taken in turn, they mean nothing."""
    return {key: value for key, value in row.items() if key not in TIME_RATIOS}


def check_keys(content: Any, keys: Sequence[str], place: str) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{place}: expected a JSON object.")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{place}: lacks {', '.join(missing)}.")
    check_fields({name: value for name, value in content.items() if name in SHAPES}, SHAPES, place)


def check_figures(row: dict[str, Any], main_score: str, place: str) -> None:
    """Figures are numbers or null, intervals pairs of numbers or null."""
    for key in (main_score, *FIGURE_KEYS):
        if not fits(row.get(key), float | None):
            raise UserError(f"{place}: {key} must be a number, got {row[key]!r}.")
    for key in INTERVAL_KEYS:
        bounds = row.get(key)
        if bounds is not None and not (fits(bounds, list[float | None]) and len(bounds) == 2):
            raise UserError(f"{place}: {key} must be [low, high], got {bounds!r}.")
