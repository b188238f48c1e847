"""Judge predictions with a language model: make request files, run them, score the answers.

export OPENAI_API_KEY=...                   # the only place the key comes from
python -m gpt_eval make  --predictions free=free/predictions_test.jsonl full=full/predictions_test.jsonl \\
                         --dataset_name debian_synopsis
python -m gpt_eval run   --model gpt-4o-mini [--dry_run]
python -m gpt_eval score

Exit codes: 0 all is well; 1 requests failed for good (run again to try them again); 2 wrong flags or files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from gpt_eval.flags import MakeArguments, RunArguments, ScoreArguments, parse_command
from models.errors import INTERRUPTED, UserError
from util.console import prepare_console

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_command(__doc__)  # before what is slow is imported

from gpt_eval.answer_log import AnswerLog, read_answers
from gpt_eval.client import Endpoint, Outcome, ask_all
from gpt_eval.cost import estimate, spent
from gpt_eval.judgements import build_requests, read_requests, write_requests
from gpt_eval.predictions import read_samples
from gpt_eval.rate_limit import RateLimiter
from gpt_eval.report import write_report
from gpt_eval.scoring import score


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    prepare_console()
    try:
        command, flags = parse_command(__doc__, arguments)
        commands: dict[str, Callable[[Any], int]] = {"make": make, "run": run, "score": score_answers}
        return commands[command](flags)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command to continue: what is answered stays.", file=sys.stderr)
        return INTERRUPTED


def make(flags: MakeArguments) -> int:
    """Write the request file from predictions and source texts."""
    from datasets import disable_progress_bars  # late: only this command reads rows

    disable_progress_bars()
    samples = read_samples(flags)
    requests = list(build_requests(samples, flags))
    write_requests(flags.requests, requests)
    distinct = {request["key"]: request["body"] for request in requests}
    print(
        f"{flags.requests}: {len(requests):,} requests, {len(distinct):,} distinct, {len(samples):,} samples"
    )
    return 0


def run(flags: RunArguments) -> int:
    """Send the requests that have no answer yet."""
    rows = read_requests(flags.requests)
    requests = {row["key"]: row["body"] for row in rows}
    prices = flags.price_in, flags.price_out
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


def score_answers(flags: ScoreArguments) -> int:
    """Score the answers of one or more judges."""
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
