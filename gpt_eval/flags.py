"""The flags of `python -m gpt_eval {make,run,score}`, validated where they enter."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import UserError
from util.flag_help import answer_help
from util.flags import (
    flag,
    list_flag,
    parse_groups,
    refuse_flags_without,
    require,
    require_known,
    require_not_negative,
    require_positive,
    required_flag,
)

FOLDER = Path("save/gpt_eval")
PROMPTS = Path(__file__).resolve().parent / "prompts"
JUDGEMENTS = ("likert", "pairwise")
OURS = {"messages", "model", "stream"}  # of a request's arguments


@dataclass(kw_only=True)
class RequestArguments:
    requests: Path = flag(FOLDER / "requests.jsonl", "The request file.")


@dataclass(kw_only=True)
class MakeArguments(RequestArguments):
    _argument_group_name = "make: write the request file from predictions and source texts"

    predictions: list[str] = required_flag("One or two of NAME=FILE; .jsonl, .csv.")
    judgements: list[str] = list_flag([], f"Of {', '.join(JUDGEMENTS)} (default: all there are files for).")
    dataset_name: str | None = flag(None, "Where the predictions' source texts are, as in run.py.")
    source_file: Path | None = flag(None, "Or a .jsonl, .csv or .parquet file of them.")
    split: str = flag("test", "Of --dataset_name.", ("train", "validation", "test"), method="dataset_name")
    source_column: str = flag("document", "Of --source_file.", method="source_file")
    id_column: str | None = flag(
        None, "Of --source_file (default: id, or the row number).", method="source_file"
    )
    prompts: Path = flag(PROMPTS, "Folder of prompts (default: the paper's).")
    num_samples: int | None = flag(None, "Draw as many (default: all).")
    seed: int = flag(0, "Of --num_samples, and sent along.")
    repeats: int = flag(1, "Ask everything as many times.")
    temperature: float = flag(0.0, "Of the judge's answers.")
    max_tokens: int = flag(256, "Of an answer.")
    structured_output: str = flag(
        "json_schema", "How a verdict is asked for.", ("json_schema", "json_object", "none")
    )
    body: dict[str, Any] | None = flag(None, "JSON of other arguments of a request; null takes one out.")

    def __post_init__(self) -> None:
        require(
            (self.dataset_name is None) != (self.source_file is None),
            "Name the source texts, with --dataset_name or with --source_file.",
        )
        self.systems = name_files(self.predictions)
        self.judgements = self.judgements or list(JUDGEMENTS[: len(self.systems)])
        require_known("judgements", self.judgements, JUDGEMENTS)
        pairs = "pairwise" not in self.judgements or len(self.systems) == 2
        require(pairs, "--judgements pairwise needs two files in --predictions.")
        for name in ("num_samples", "repeats", "max_tokens"):
            require_positive(name, getattr(self, name))
        for name in ("seed", "temperature"):
            require_not_negative(name, getattr(self, name))
        self.body = self.body or {}
        require(not OURS & set(self.body), f"--body: leave out {', '.join(sorted(OURS))}.")
        require(
            self.repeats == 1 or "seed" not in self.body,
            f"--repeats {self.repeats} asks with another seed each time: leave seed out of --body.",
        )
        texts = "dataset_name" if self.dataset_name else "source_file"
        refuse_flags_without(
            self, [texts], {"dataset_name": "--dataset_name", "source_file": "--source_file"}
        )


@dataclass(kw_only=True)
class RunArguments(RequestArguments):
    _argument_group_name = "run: send the requests that have no answer yet"

    answers: Path = flag(FOLDER / "answers.jsonl", "Where answers are kept.")
    base_url: str = flag("https://api.openai.com/v1", "Of the judge's server.")
    model: str = required_flag("The judge.")
    requests_per_minute: float = flag(500.0, "Most requests.")
    tokens_per_minute: float = flag(200_000.0, "Most tokens.")
    concurrency: int = flag(8, "Requests under way at once.")
    timeout: float = flag(60.0, "Seconds to a whole answer.")
    max_attempts: int = flag(6, "Of a request.")
    backoff: float = flag(1.0, "First wait in seconds, doubling.")
    price_in: float | None = flag(None, "USD for a million prompt tokens.")
    price_out: float | None = flag(None, "USD for a million answer tokens.")
    dry_run: bool = flag(False, "Send nothing; print requests, tokens and price.")

    def __post_init__(self) -> None:
        names = ("requests_per_minute", "tokens_per_minute", "concurrency", "timeout")
        for name in (*names, "max_attempts", "backoff"):
            require_positive(name, getattr(self, name))
        for name in ("price_in", "price_out"):
            require_not_negative(name, getattr(self, name))
        both = (self.price_in is None) == (self.price_out is None)
        require(both, "Give both --price_in and --price_out, or none.")


@dataclass(kw_only=True)
class ScoreArguments(RequestArguments):
    _argument_group_name = "score: score the answers of one or more judges"

    answers: list[Path] = list_flag([FOLDER / "answers.jsonl"], "One file a judge.")
    output_dir: Path = flag(FOLDER, "Where the report goes.")
    seed: int = flag(0, "Of the bootstrap.")

    def __post_init__(self) -> None:
        require_not_negative("seed", self.seed)


COMMANDS = {"make": MakeArguments, "run": RunArguments, "score": ScoreArguments}


def parse_command(description: str, argv: Sequence[str] | None = None) -> tuple[str, Any]:
    """The command that is asked for, and its flags; help is printed, and ends the program.

    Raises:
        UserError: no or an unknown command; unknown, missing, malformed or contradictory flags.
    """
    name, *words = list(sys.argv[1:] if argv is None else argv) or [""]
    if name not in COMMANDS:
        answer_help((*COMMANDS.values(),), description, argv=[name, *words])
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f": did you mean {near[0]}?" if near else "."
        raise UserError(f"The commands are {', '.join(COMMANDS)}, not {name or 'nothing'}{hint}")
    group = COMMANDS[name]
    answer_help((group,), description, argv=words)
    return name, parse_groups((group,), description, words)[0]


def name_files(pairs: list[str]) -> dict[str, Path]:
    """`--predictions` by name of system."""
    named = {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}
    if "" in named or "tie" in named or Path() in named.values() or not len(named) == len(pairs) <= 2:
        raise UserError("--predictions: give one or two of NAME=FILE, under different names (not 'tie').")
    return named
