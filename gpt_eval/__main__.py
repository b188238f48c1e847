"""Judge predictions with a language model: make request files, run them, score the answers.

export OPENAI_API_KEY=...                   # the only place the key comes from
python -m gpt_eval make  --predictions free=free/predictions_test.jsonl full=full/predictions_test.jsonl \\
                         --dataset_name debian_synopsis
python -m gpt_eval run   --model gpt-4o-mini [--dry_run]
python -m gpt_eval score

Exit codes: 0 all is well; 1 requests failed for good (run again to try them again); 2 wrong flags or files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpt_eval.answer_log import AnswerLog, read_answers
from gpt_eval.client import Endpoint, Outcome, ask_all
from gpt_eval.cost import estimate, spent
from gpt_eval.judgements import PROMPTS, build_requests, read_requests, write_requests
from gpt_eval.predictions import read_samples
from gpt_eval.rate_limit import RateLimiter
from gpt_eval.report import write_report
from gpt_eval.scoring import score
from models.errors import INTERRUPTED, UserError
from models.json_files import LARGEST

FOLDER = Path("save/gpt_eval")


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpt_eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{make,run,score}")
    for command, add_flags in (
        (make, add_make_flags),
        (run, add_run_flags),
        (score_answers, add_score_flags),
    ):
        name = command.__name__.removesuffix("_answers")
        subparser = commands.add_parser(
            name, help=command.__doc__, description=command.__doc__, allow_abbrev=False
        )
        subparser.add_argument("--requests", type=Path, default=FOLDER / "requests.jsonl", help="%(default)s")
        add_flags(subparser)
        subparser.set_defaults(command=command)
    return parser.parse_args(arguments)


def add_make_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--predictions",
        nargs="+",
        required=True,
        metavar="NAME=FILE",
        help="one or two systems; .jsonl, .csv",
    )
    add(
        "--judgements",
        nargs="+",
        choices=("likert", "pairwise"),
        help="default: all that there are files for",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset_name", help="where the predictions' source texts are, as in run.py")
    source.add_argument("--source_file", type=Path, help="or a .jsonl, .csv or .parquet file of them")
    add("--split", default="test", choices=("train", "validation", "test"))
    add("--source_column", default="document", help="of --source_file (default: %(default)s)")
    add("--id_column", help="of --source_file (default: id, or the row number)")
    add("--prompts", type=Path, default=PROMPTS, help="folder of prompts (default: the paper's)")
    add("--num_samples", type=positive(int), help="draw as many (default: all)")
    add("--seed", type=positive(int, or_zero=True), default=0, help="of --num_samples, and sent along")
    add("--repeats", type=positive(int), default=1, help="ask everything as many times")
    add("--temperature", type=positive(float, or_zero=True), default=0.0)
    add("--max_tokens", type=positive(int), default=256, help="of an answer (default: %(default)s)")
    add("--structured_output", default="json_schema", choices=("json_schema", "json_object", "none"))
    add(
        "--body",
        type=json_object,
        default={},
        help="JSON of other arguments of a request; null takes one out",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--answers", type=Path, default=FOLDER / "answers.jsonl", help="%(default)s")
    add("--base_url", default="https://api.openai.com/v1", help="%(default)s")
    add("--model", required=True)
    add("--requests_per_minute", type=positive(float), default=500.0, help="%(default)s")
    add("--tokens_per_minute", type=positive(float), default=200_000.0, help="%(default)s")
    add("--concurrency", type=positive(int), default=8, help="requests under way at once (%(default)s)")
    add("--timeout", type=positive(float), default=60.0, help="seconds to a whole answer (%(default)s)")
    add("--max_attempts", type=positive(int), default=6, help="%(default)s")
    add("--backoff", type=positive(float), default=1.0, help="first wait in seconds, doubling (%(default)s)")
    add("--price_in", type=positive(float, or_zero=True), help="USD for a million prompt tokens")
    add("--price_out", type=positive(float, or_zero=True), help="USD for a million answer tokens")
    add("--dry_run", action="store_true", help="send nothing; print requests, tokens and price")


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    default = [FOLDER / "answers.jsonl"]
    parser.add_argument("--answers", type=Path, nargs="+", default=default, help="one file a judge")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="%(default)s")
    parser.add_argument("--seed", type=positive(int, or_zero=True), default=0, help="of the bootstrap")


def positive(kind: type, or_zero: bool = False) -> Any:
    """The type of a flag: a number above zero, or zero itself, that 64 bits hold."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 <= value <= LARGEST or (value == 0 and not or_zero):  # nor nan
            bound = f"{'from zero on' if or_zero else 'above zero'}, at most 2^63 - 1"
            raise argparse.ArgumentTypeError(f"{text} is not a number {bound}")
        return value

    return number


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from error
    if not isinstance(value, dict) or {"messages", "model", "stream"} & set(value):
        raise argparse.ArgumentTypeError("give a JSON object without messages, model and stream")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    flags = parse_flags(arguments)
    try:
        return flags.command(flags)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command to continue: what is answered stays.", file=sys.stderr)
        return INTERRUPTED


def make(flags: argparse.Namespace) -> int:
    """make the request file from predictions and source texts"""
    flags.predictions = name_files(flags.predictions)
    flags.judgements = flags.judgements or ["likert", "pairwise"][: len(flags.predictions)]
    if "pairwise" in flags.judgements and len(flags.predictions) != 2:
        raise UserError("--judgements pairwise needs two files in --predictions.")
    samples = read_samples(flags)
    requests = list(build_requests(samples, flags))
    write_requests(flags.requests, requests)
    distinct = {request["key"]: request["body"] for request in requests}
    print(
        f"{flags.requests}: {len(requests):,} requests, {len(distinct):,} distinct, {len(samples):,} samples"
    )
    return 0


def name_files(pairs: list[str]) -> dict[str, Path]:
    """`--predictions` by name of system."""
    named = {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}
    if "" in named or "tie" in named or Path() in named.values() or not len(named) == len(pairs) <= 2:
        raise UserError("--predictions: give one or two of NAME=FILE, under different names (not 'tie').")
    return named


def run(flags: argparse.Namespace) -> int:
    """send the requests that have no answer yet"""
    rows = read_requests(flags.requests)
    requests = {row["key"]: row["body"] for row in rows}
    prices = flags.price_in, flags.price_out
    if (flags.price_in is None) != (flags.price_out is None):
        raise UserError("Give both --price_in and --price_out, or none.")
    answered = read_answers(flags.answers)
    pending = {key: body for key, body in requests.items() if key not in answered}
    print(
        f"{len(requests):,} distinct requests, {len(pending):,} to send: {estimate(pending.values(), prices)}"
    )
    if flags.dry_run:
        return 0
    names = ("base_url", "model", "concurrency", "timeout", "max_attempts", "backoff")
    endpoint = Endpoint(**{name: getattr(flags, name) for name in names})
    limiter = RateLimiter(flags.requests_per_minute, flags.tokens_per_minute)
    with AnswerLog(flags.answers, flags.model) as log:
        outcome = ask_all(requests, endpoint, limiter, log)
        answers = [log.answers[key] for key in requests if key in log.answers]
    print(f"{flags.answers}: {len(answers):,} of {len(requests):,} answered, {spent(answers, prices)} in all")
    if outcome.lost:
        print(f"besides {spent(outcome.lost, prices)} for requests that failed")
    list_failures(outcome, rows)
    list_refusals(log.answers, rows)
    return 1 if len(answers) < len(requests) else 0


def list_failures(outcome: Outcome, requests: list[dict[str, Any]]) -> None:
    """Every request that failed for good, with its reason."""
    for row in requests:
        if row["key"] in outcome.failures:
            print(f"failed: {name_request(row)}: {outcome.failures[row['key']]}", file=sys.stderr)
    if outcome.stopped is not None:
        print(f"stopped, as the other requests would fail as well: {outcome.stopped}", file=sys.stderr)


def list_refusals(answers: dict[str, dict[str, Any]], requests: list[dict[str, Any]]) -> None:
    """Every request whose answer has no text, with the reason; it is paid for and not asked again."""
    for row in requests:
        record = answers.get(row["key"], {})
        if record and not record["answer"]:
            print(f"no verdict: {name_request(row)}: {record.get('reason', 'empty')}", file=sys.stderr)


def name_request(row: dict[str, Any]) -> str:
    return f"{row['judgement']} of {row['id']!r} by {' : '.join(row['systems'])}, repeat {row['repeat']}"


def score_answers(flags: argparse.Namespace) -> int:
    """score the answers of one or more judges"""
    requests = read_requests(flags.requests)
    judges: dict[str, dict[str, Any]] = {}
    for path in flags.answers:
        answers = read_answers(path)
        judge = next((record["model"] for record in answers.values()), None)
        if judge is None:
            raise UserError(f"{path}: there are no answers.")
        if judge in judges:
            raise UserError(f"--answers: two files hold answers of {judge}.")
        judges[judge] = answers
    write_report(flags.output_dir, score(requests, judges, flags.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
