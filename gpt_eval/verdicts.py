"""Requests with what their answers say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gpt_eval.parsing import parse_answer

STATES = ("strict", "lenient", "unparsable", "refused", "missing")


@dataclass(frozen=True)
class Judged:
    """A request with what its answer says. `verdict` is None where there is no answer, or none to be read."""

    judge: str
    judgement: str
    id: str
    systems: tuple[str, ...]
    repeat: int
    key: str  # of the request: those with the same body share an answer
    verdict: Any
    state: str  # one of STATES

    @property
    def preference(self) -> str | None:
        """Name of the better system, "tie", or None."""
        if self.verdict is None or self.verdict == "tie":
            return self.verdict
        return self.systems[int(self.verdict[-1])]


def read_verdicts(
    judge: str, requests: list[dict[str, Any]], answers: dict[str, dict[str, Any]]
) -> list[Judged]:
    """Every request with the verdict of one judge."""
    judged = []
    for request in requests:
        verdict, state = None, "missing"
        if request["key"] in answers:
            text = answers[request["key"]]["answer"]
            verdict, state = parse_answer(request["judgement"], text) if text else (None, "refused")
        names = request["judgement"], request["id"], tuple(request["systems"]), request["repeat"]
        judged.append(Judged(judge, *names, request["key"], verdict, state))
    return judged


def count_states(judged: Iterable[Judged]) -> dict[str, int]:
    counts = Counter(row.state for row in judged)
    return {state: counts[state] for state in STATES}
