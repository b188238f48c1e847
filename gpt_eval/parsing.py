"""What a judge may answer, as JSON schemas, and how its answers are read.

A strict parse wants exactly the JSON object of the schema. A lenient one also takes an object inside other
text, and the plain forms that models answer the paper's prompts with. An answer is read as a whole or not at
all, and only ever as text.
"""

from __future__ import annotations

import json
import re
from typing import Any

DIMENSIONS = ("relevance", "informativeness", "fluency", "coherence")
RATINGS = (1, 2, 3, 4, 5)
CHOICES = ("Summary 0", "Summary 1", "tie")

THINKING = re.compile(r"\A.*</think>|\A\s*<think>.*", re.DOTALL)  # in the text, where no part of its own
DECORATION = re.compile(r"[*_`\"'#]")
RATING = r"\b{name}\b(?:\s*\([^)]*\))?\s*[:=-]\s*(\d+(?:\.\d+)?)(?:\s*/\s*5)?(?!\d|\s*/)"
CHOICE = re.compile(
    r"(?:(?:the )?(?:answer|better|better (?:summary|one))(?: is)?\W*)?"
    r"(?:(summary) ?([01])|(tie))(?: is (?:the )?better(?: summary| one)?)?\W*",
    re.IGNORECASE,
)


def schema(judgement: str) -> dict[str, Any]:
    """JSON schema of an answer, in the form that `response_format` takes."""
    if judgement == "likert":
        properties = {name: {"type": "integer", "enum": list(RATINGS)} for name in DIMENSIONS}
    else:
        properties = {"better": {"type": "string", "enum": list(CHOICES)}}
    content = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"name": judgement, "strict": True, "schema": content}


def parse_answer(judgement: str, text: str) -> tuple[Any, str]:
    """A verdict and how it was read: "strict", "lenient", or (None, "unparsable").

    A Likert verdict maps each dimension to a rating, a pairwise verdict is one of `CHOICES`.
    """
    verdict = check(judgement, decode_json(text))
    if verdict is not None:
        return verdict, "strict"
    read = read_likert if judgement == "likert" else read_pairwise
    verdict = read(THINKING.sub("", text, count=1))
    return verdict, "unparsable" if verdict is None else "lenient"


def decode_json(text: str) -> Any:
    """The value that the text is JSON of; None if it is not JSON, or nests too deeply to be an answer."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def check(judgement: str, value: Any) -> Any:
    """The verdict in a decoded JSON object; None unless it is exactly of the schema."""
    expected = set(DIMENSIONS) if judgement == "likert" else {"better"}
    if not isinstance(value, dict) or set(value) != expected:
        return None
    if judgement == "likert":
        right = all(type(rating) is int and rating in RATINGS for rating in value.values())
        return value if right else None
    return value["better"] if value["better"] in CHOICES else None


def find_object(judgement: str, text: str) -> Any:
    """The verdict of the only flat JSON object of the schema inside the text."""
    found = [check(judgement, decode_json(part)) for part in re.findall(r"\{[^{}]*\}", text)]
    found = [verdict for verdict in found if verdict is not None]
    return found[0] if found and all(verdict == found[0] for verdict in found) else None


def read_likert(text: str) -> dict[str, int] | None:
    """Ratings from lines such as "Relevance: 4" or "**Fluency** - 5/5"; every dimension exactly once."""
    verdict = find_object("likert", text)
    if verdict is not None:
        return verdict
    plain = DECORATION.sub("", text)
    ratings = {}
    for name in DIMENSIONS:
        found = re.findall(RATING.format(name=name), plain, re.IGNORECASE)
        if len(found) != 1 or found[0] not in map(str, RATINGS):
            return None
        ratings[name] = int(found[0])
    return ratings


def read_pairwise(text: str) -> str | None:
    """The choice that is a line of its own, such as "Summary 1 is better."; None if lines disagree."""
    verdict = find_object("pairwise", text)
    if verdict is not None:
        return verdict
    lines = (CHOICE.fullmatch(DECORATION.sub("", line).strip()) for line in text.splitlines())
    choices = {"tie" if match[3] else f"Summary {match[2]}" for match in lines if match}
    return choices.pop() if len(choices) == 1 else None
