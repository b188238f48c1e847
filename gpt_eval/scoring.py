"""From answers to scores: Likert means, win rates, position bias, agreement.

The unit of every interval and test is the sample: repeats of a question are averaged first, because they are
not independent of each other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
from scipy.stats import binomtest

from gpt_eval.agreement import summarize_agreement
from gpt_eval.cost import sum_usage
from gpt_eval.parsing import DIMENSIONS
from gpt_eval.verdicts import Judged, count_states, read_verdicts
from util.evaluation.significance import CONFIDENCE, interval, resamples


def score(
    requests: list[dict[str, Any]], judges: dict[str, dict[str, dict[str, Any]]], seed: int = 0
) -> dict[str, Any]:
    """Scores of all judges (each with its answers by key); the layout is that of `gpt_eval.report`."""
    verdicts = {judge: read_verdicts(judge, requests, answers) for judge, answers in judges.items()}
    asked = {request["key"] for request in requests}
    results: dict[str, Any] = {"requests": len(requests), "distinct_requests": len(asked), "judges": {}}
    for judge, judged in verdicts.items():
        used = [record for key, record in judges[judge].items() if key in asked]
        prompt_tokens, completion_tokens = sum_usage(used)
        results["judges"][judge] = {
            "answers": count_states(judged),
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
            **score_judge(judged, seed),
        }
    results["agreement"] = summarize_agreement([row for judged in verdicts.values() for row in judged])
    return results


def score_judge(judged: list[Judged], seed: int) -> dict[str, Any]:
    likert = [row for row in judged if row.judgement == "likert"]
    pairwise = [row for row in judged if row.judgement == "pairwise"]
    results: dict[str, Any] = {}
    if likert:
        results["likert"] = score_likert(likert, seed)
    if pairwise:
        results["pairwise"] = score_pairwise(pairwise)
    return results


def score_likert(judged: list[Judged], seed: int) -> dict[str, Any]:
    """Mean ratings of each system and, of two systems, the mean difference (first - second)."""
    ratings: dict[str, dict[str, list[list[int]]]] = {row.systems[0]: defaultdict(list) for row in judged}
    for row in judged:
        if row.verdict is not None:
            ratings[row.systems[0]][row.id].append([row.verdict[name] for name in DIMENSIONS])
    means = {
        system: {name: np.mean(repeats, axis=0) for name, repeats in samples.items()}
        for system, samples in ratings.items()
    }
    results: dict[str, Any] = {"systems": {}}
    for system, samples in means.items():
        counts = count_states(row for row in judged if row.systems[0] == system)
        figures = summarize_ratings(list(samples.values()), seed)
        results["systems"][system] = {"answers": counts, "samples": len(samples), **figures}
    if len(means) == 2:
        first, second = means.values()
        shared = [first[name] - second[name] for name in first if name in second]
        results["difference"] = {"samples": len(shared), **summarize_ratings(shared, seed)}
    return results


def summarize_ratings(rows: list[np.ndarray], seed: int) -> dict[str, dict[str, Any]]:
    """Mean and bootstrap interval of each dimension and of their average, over samples."""
    if not rows:
        return {}
    values = np.array(rows)
    values = np.column_stack([values, values.mean(axis=1)])  # (samples, dimensions + 1)
    draws = values[resamples(len(values), seed)].mean(axis=1)
    return {
        name: {"mean": float(values[:, column].mean()), "interval": interval(draws[:, column])}
        for column, name in enumerate((*DIMENSIONS, "average"))
    }


def score_pairwise(judged: list[Judged]) -> dict[str, Any]:
    """Wins, losses and ties of the first system, and what the order of the summaries did.

    A system wins a pair of answers if it is better in both orders; else the pair is a tie. Over repeats it
    wins the sample if it wins more pairs than it loses. Pairs that lack a readable answer are left out, and
    where both texts are the same, one answer to both orders says nothing of their places.
    """
    first, second = judged[0].systems
    pairs = group_orders(judged)
    complete = {
        name: pair
        for name, pair in pairs.items()
        if len(pair) == 2 and all(row.verdict is not None for row in pair)
    }
    placed = {name: pair for name, pair in complete.items() if pair[0].key != pair[1].key}
    outcomes: dict[str, list[int]] = defaultdict(list)
    slots: dict[str, list[int]] = defaultdict(list)
    for (name, _), (one, other) in complete.items():
        outcomes[name].append((one.preference == other.preference) * sign(one.preference, first, second))
    for (name, _), (one, other) in placed.items():
        slots[name].append((one.verdict == other.verdict) * sign(one.verdict, "Summary 0", "Summary 1"))
    wins, losses, ties = count_signs(outcomes)
    test = sign_test(wins, losses)
    return {
        "systems": [first, second],
        "answers": count_states(judged),
        "samples": len(outcomes),
        "incomplete_pairs": len(pairs) - len(complete),
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "win_rate": test["share"],
        "interval": test["interval"],
        "p_value": test["p_value"],
        "position": score_position(list(placed.values()), slots),
    }


def group_orders(judged: list[Judged]) -> dict[tuple[str, int], list[Judged]]:
    """The answers to both orders of each sample and repeat."""
    pairs: dict[tuple[str, int], list[Judged]] = defaultdict(list)
    for row in judged:
        pairs[row.id, row.repeat].append(row)
    return pairs


def score_position(pairs: list[list[Judged]], slots: dict[str, list[int]]) -> dict[str, Any]:
    """How often the place decided: the same place chosen in both orders, tested against chance."""
    choices = Counter(row.verdict for pair in pairs for row in pair)
    decided = choices["Summary 0"] + choices["Summary 1"]
    both_first, both_second, _ = count_signs(slots)
    agreeing = sum(one.preference == other.preference for one, other in pairs)
    return {
        "first_share": choices["Summary 0"] / decided if decided else None,
        "consistency": agreeing / len(pairs) if pairs else None,
        "always_first": both_first,
        "always_second": both_second,
        "p_value": sign_test(both_first, both_second)["p_value"],
    }


def sign(value: str | None, plus: str, minus: str) -> int:
    return (value == plus) - (value == minus)


def count_signs(samples: dict[str, list[int]]) -> tuple[int, int, int]:
    """Samples whose repeats add up to more than, less than, and exactly zero."""
    signs = [int(np.sign(sum(repeats))) for repeats in samples.values()]
    return signs.count(1), signs.count(-1), signs.count(0)


def sign_test(plus: int, minus: int) -> dict[str, Any]:
    """Share of plus, its exact interval and a two-sided binomial test against 1/2; None without any."""
    if plus + minus == 0:
        return {"share": None, "interval": None, "p_value": None}
    test = binomtest(plus, plus + minus)
    bounds = test.proportion_ci(CONFIDENCE)
    return {
        "share": plus / (plus + minus),
        "interval": [float(bounds.low), float(bounds.high)],
        "p_value": float(test.pvalue),
    }
