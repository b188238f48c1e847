"""What requests will cost, and what answers did cost.

Before a run tokens are estimated at four characters each, a rule of thumb for English, and every answer is
taken to be as long as it may be; after it they are what the endpoint counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

CHARACTERS_PER_TOKEN = 4


def estimate_prompt_tokens(body: dict[str, Any]) -> int:
    """Tokens of the messages and the JSON schema."""
    counted = [message["content"] for message in body["messages"]]
    counted.append(json.dumps(body.get("response_format", "")))
    return math.ceil(sum(map(len, counted)) / CHARACTERS_PER_TOKEN)


def max_completion_tokens(body: dict[str, Any]) -> int:
    return body.get("max_completion_tokens") or body.get("max_tokens") or 0


def estimate_tokens(body: dict[str, Any]) -> int:
    """What a request counts for under a limit on tokens a minute."""
    return estimate_prompt_tokens(body) + max_completion_tokens(body)


def estimate(bodies: Iterable[dict[str, Any]], prices: tuple[float | None, float | None]) -> str:
    """A line on the tokens of requests not yet sent and, with prices, the most they will cost."""
    bodies = list(bodies)
    counts = sum(map(estimate_prompt_tokens, bodies)), sum(map(max_completion_tokens, bodies))
    return (
        f"about {counts[0]:,} prompt and at most {counts[1]:,} answer tokens{price(counts, prices, 'up to ')}"
    )


def spent(records: Iterable[dict[str, Any]], prices: tuple[float | None, float | None]) -> str:
    """A line on the tokens that the endpoint counted."""
    counts = sum_usage(records)
    return f"{counts[0]:,} prompt and {counts[1]:,} answer tokens{price(counts, prices, '')}"


def sum_usage(records: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Prompt and answer tokens; endpoints that count none add nothing."""
    usages = [record.get("usage") or {} for record in records]
    names = ("prompt_tokens", "completion_tokens")
    prompt, completion = (sum(usage.get(name) or 0 for usage in usages) for name in names)
    return prompt, completion


def add_usage(usages: Iterable[dict[str, Any] | None]) -> dict[str, int]:
    """One usage for several responses."""
    prompt, completion = sum_usage({"usage": usage} for usage in usages)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def price(counts: tuple[int, int], prices: tuple[float | None, float | None], bound: str) -> str:
    """The price in USD; empty unless both prices (USD per million tokens) are known."""
    if prices[0] is None or prices[1] is None:
        return ""
    return f", {bound}${(counts[0] * prices[0] + counts[1] * prices[1]) / 1e6:.4f}"
