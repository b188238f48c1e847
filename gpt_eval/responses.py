"""What an endpoint's response holds: an answer, the reason why there is none, or an error.

Endpoints that speak OpenAI's format report errors with status 200, too: an `error` object instead of choices
or inside one, a `finish_reason` of "error", a gateway's HTML page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

RETRIED_STATUSES = {408, 409, 429}  # and 5xx
HOPELESS_STATUSES = {401, 402, 403, 404}  # wrong key, no credit, wrong model or address: all requests fail
HOPELESS_CODES = {
    "insufficient_quota",
    "invalid_api_key",
    "authentication_error",
    "permission_error",
    "model_not_found",
}
CONTENT_CODES = {"content_filter", "content_policy_violation"}  # of one request, whatever the status
FINAL_CODES = CONTENT_CODES | {  # of errors without a status that the same request meets again
    "invalid_request_error",
    "BadRequestError",
    "context_length_exceeded",
}
NAMED = ("code", "type", "status")  # by which an error object says what it is
TEXT_PARTS = {"text", "output_text", None}
EXCERPT = 200  # characters of a response that is not understood


class ResponseError(Exception):
    """A response without an answer.

    Args:
        reason: what is wrong with it.
        status: HTTP status that the error names.
        codes: its `code` and `type`.
        usage: tokens that were counted all the same.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        codes: frozenset[str] = frozenset(),
        usage: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.codes = codes
        self.usage = usage
        self.headers: Mapping[str, str] = {}


def is_hopeless(status: int | None, codes: frozenset[str]) -> bool:
    """Whether no request can succeed any more."""
    return not codes & CONTENT_CODES and (status in HOPELESS_STATUSES or bool(codes & HOPELESS_CODES))


def is_transient(status: int | None, codes: frozenset[str]) -> bool:
    """Whether the same request may succeed later."""
    if is_hopeless(status, codes):
        return False
    if status is None:
        return not codes & FINAL_CODES
    return status in RETRIED_STATUSES or status >= 500


def read_completion(text: str) -> dict[str, Any]:
    """What the log keeps of a response: `answer`, `finish_reason`, `usage` and `served_model`.

    An answer that asking again would not change (a refusal, nothing but thinking) was paid for: it is kept as
    None, with a `reason`.

    Raises:
        ResponseError: there is no answer; the same request may still get one.
    """
    content = decode(text)
    usage = read_usage(content.get("usage"))
    if content.get("error") or content.get("object") == "error":
        raise_error(content.get("error") or content, usage)
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ResponseError(f"the response has no choices: {excerpt(text)}", usage=usage)
    choice, message = choices[0], choices[0].get("message")
    if choice.get("error") or choice.get("finish_reason") == "error":
        raise_error(choice.get("error") or "the endpoint broke the answer off (finish_reason error)", usage)
    if not isinstance(message, dict):
        raise ResponseError(f"the response has no message: {excerpt(text)}", usage=usage)
    record: dict[str, Any] = {"answer": text_of(message.get("content"))}
    if not record["answer"].strip():
        record = {"answer": None, "reason": explain_silence(message, choice.get("finish_reason"), usage)}
    return record | {
        "finish_reason": choice.get("finish_reason"),
        "usage": usage,
        "served_model": content.get("model"),
    }


def decode(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ResponseError(f"the response is not JSON: {excerpt(text)}") from error
    if not isinstance(content, dict):
        raise ResponseError(f"the response is not a chat completion: {excerpt(text)}")
    return content


def read_usage(usage: Any) -> dict[str, Any] | None:
    """The endpoint's counts; None where it gives none that can be added up."""
    if not isinstance(usage, dict):
        return None
    names = ("prompt_tokens", "completion_tokens")
    return usage if all(type(usage.get(name) or 0) in (int, float) for name in names) else None


def raise_error(error: Any, usage: dict[str, Any] | None) -> NoReturn:
    """Raise what an error object, or a text in its place, says."""
    if not isinstance(error, dict):
        raise ResponseError(str(error), usage=usage)
    named = [str(error.get(name)) for name in NAMED]
    numbers = [int(text) for text in named if text.isdecimal() and 400 <= int(text) < 600]
    reason = str(error.get("message") or json.dumps(error))
    raise ResponseError(reason, numbers[0] if numbers else None, codes_in(error), usage)


def codes_in(error: Any) -> frozenset[str]:
    """What an error object calls itself."""
    if not isinstance(error, dict):
        return frozenset()
    codes = {error[name] for name in NAMED if isinstance(error.get(name), str)}
    metadata = error.get("metadata")
    if isinstance(metadata, dict) and "flagged_input" in metadata:  # OpenRouter's moderation: a bare 403
        codes.add("content_filter")
    return frozenset(codes)


def text_of(content: Any) -> str:
    """The text of a message: a string, or a list of parts, of which those of thinking are left out."""
    if isinstance(content, list):
        return "".join(map(text_of, content))
    if not isinstance(content, dict):
        return content if isinstance(content, str) else ""
    if "type" not in content and "text" not in content:  # the JSON asked for, already decoded
        return json.dumps(content)
    return text_of(content.get("text")) if content.get("type") in TEXT_PARTS else ""


def refusal_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    parts = [part.get("refusal") for part in content or () if isinstance(part, dict)] if content else []
    return " ".join(str(text) for text in (message.get("refusal"), *parts) if text)


def explain_silence(message: dict[str, Any], finish_reason: Any, usage: dict[str, Any] | None) -> str:
    """Why a message has no text.

    Raises:
        ResponseError: for no reason at all, and nothing was counted: ask again.
    """
    if refusal := refusal_of(message):
        return f"refused: {refusal}"
    if finish_reason == "content_filter":
        return "withheld by the endpoint's content filter"
    if finish_reason == "length":
        return "cut off at --max_tokens before any text (thinking counts as well): make with more"
    if message.get("tool_calls") or message.get("function_call"):
        return "a tool call instead of a text"
    tokens = (usage or {}).get("completion_tokens")
    if tokens:
        return f"no text among its {tokens} tokens (finish_reason {finish_reason})"
    raise ResponseError(f"the answer is empty (finish_reason {finish_reason})", usage=usage)


def excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= EXCERPT else f"{text[:EXCERPT]}...")
