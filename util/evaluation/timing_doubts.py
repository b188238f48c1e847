"""Whether measured times can be believed: pure functions of records and figures.

A doubt is a clause such as "measured 8.13x, the work saved allows 4.00x"; rows of figures carry theirs as
`timing_doubt`, and `untrusted_timing(rows)` says it in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from util.evaluation.records import Record

WORK = ("layer_calls", "full_layer_calls")  # the second grows with the steps
SLACK = 1.05  # fewer layers may stay in the processor's caches and so run a little faster each
MISS = 0.25  # between prediction and measurement


def possible_speedup(records: Sequence[Record], baseline: Sequence[Record]) -> float | None:
    """What the work saved allows; None where the work is not known.

    Time goes into layers, steps (embedding, head, criteria) and samples (encoder), and a ratio of sums is at
    most the largest ratio of their parts. Unlike the ideal speed-up this one counts that an output
    shorter than full depth's takes less time.
    """
    totals = [
        [sum(getattr(record, name) for record in rows) for name in WORK] for rows in (baseline, records)
    ]
    if not all(total for side in totals for total in side):
        return None
    return max(1.0, *(theirs / ours for theirs, ours in zip(*totals, strict=True)))


def doubt_speedup(speedup: float, interval: Sequence[float], possible: float | None) -> str | None:
    """A doubt where all of the measured speed-up's 95% interval lies above what is possible."""
    if possible is None or interval[0] <= SLACK * possible:
        return None
    return f"measured {speedup:.2f}x, the work saved allows {possible:.2f}x"


def doubt_prediction(predicted: float, measured: float, unit: str = "x") -> str | None:
    """A doubt where a prediction misses what was measured by more than a quarter of it."""
    if abs(predicted / measured - 1) <= MISS:
        return None
    return f"predicted {predicted:.2f}{unit}, measured {measured:.2f}{unit}"


def untrusted_timing(rows: Iterable[dict[str, Any]]) -> str | None:
    """A sentence with the doubts of all rows; None if there are none."""
    doubts = [f"{row['name']} {row['timing_doubt']}" for row in rows if row.get("timing_doubt")]
    if not doubts:
        return None
    return (
        f"This timing cannot be trusted: {'; '.join(doubts)}. "
        "Measure again with nothing else running on the machine."
    )
