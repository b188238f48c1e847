"""Send requests to an OpenAI-compatible endpoint and log each answer as it comes.

A request whose answer is in the log is never sent again. One that was under way when the run was killed, or
whose answer was lost on its way, has no answer in the log and is sent again; the endpoint may bill it twice.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.resources.chat import AsyncCompletions
from openai.types.chat import ChatCompletion
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

from gpt_eval.answer_log import AnswerLog
from gpt_eval.cost import estimate_tokens
from gpt_eval.rate_limit import RateLimiter
from models.errors import UserError
from util.progress import Progress

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIED_STATUSES = {408, 409, 429}  # and 5xx
HOPELESS_STATUSES = {401, 403, 404}  # wrong key, model or address: the next request fails as well
MAX_FAILURES_IN_A_ROW = 20
LONGEST_BACKOFF = 60.0


class MalformedResponse(Exception):
    """The endpoint's response is no chat completion."""


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask. `backoff`: seconds, doubling, where no Retry-After is given."""

    base_url: str
    model: str
    concurrency: int = 8
    timeout: float = 60.0
    max_attempts: int = 6
    backoff: float = 1.0


@dataclass
class Outcome:
    """`failures` maps keys to reasons; `stopped` says why the rest was not sent."""

    failures: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None


def read_key() -> str:
    """The API key of the environment.

    Raises:
        UserError: there is none, or it cannot be one; the message never holds it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        problem = "has characters that no key has" if key else "is not set (a server without keys takes any)"
        raise UserError(f"The environment variable {KEY_VARIABLE} {problem}.")
    return key


def check_base_url(base_url: str) -> None:
    """Raise UserError for what is no address, or might hold a secret."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base_url: give an address such as https://api.openai.com/v1.")
    if parts.username or parts.password or parts.query:
        raise UserError(f"--base_url: leave out user, password and query; the key comes from {KEY_VARIABLE}.")


def ask_all(
    requests: dict[str, dict[str, Any]], endpoint: Endpoint, limiter: RateLimiter, log: AnswerLog
) -> Outcome:
    """Send the bodies in `requests` (by key) that have no answer in the log yet."""
    check_base_url(endpoint.base_url)
    pending = {key: body for key, body in requests.items() if key not in log.answers}
    for key, body in pending.items():
        if estimate_tokens(body) > limiter.tokens:
            raise UserError(f"--tokens_per_minute is less than the {estimate_tokens(body)} of request {key}.")
    return asyncio.run(Sender(endpoint, limiter, log, read_key()).send(pending))


class Sender:
    """A few workers that take requests in turn; all of them wait for one limiter and write to one log."""

    def __init__(self, endpoint: Endpoint, limiter: RateLimiter, log: AnswerLog, key: str) -> None:
        self.endpoint = endpoint
        self.limiter = limiter
        self.log = log
        self.outcome = Outcome()
        self._key = key
        self._failures_in_a_row = 0

    async def send(self, pending: dict[str, dict[str, Any]]) -> Outcome:
        """Ask everything, or stop early where going on is hopeless."""
        options = {"base_url": self.endpoint.base_url, "timeout": self.endpoint.timeout, "max_retries": 0}
        queue = iter(pending.items())
        with Progress("Asking", len(pending), "request") as progress:
            async with openai.AsyncOpenAI(api_key=self._key, **options) as client:
                count = min(self.endpoint.concurrency, len(pending))
                completions = client.chat.completions  # loads modules: better before requests are timed
                await asyncio.gather(*(self._work(completions, queue, progress) for _ in range(count)))
        return self.outcome

    async def _work(
        self, completions: AsyncCompletions, queue: Iterator[tuple[str, dict[str, Any]]], progress: Progress
    ) -> None:
        for key, body in queue:
            if self.outcome.stopped is not None:
                return
            try:
                self.log.append(key, await self._ask(completions, body))
                self._failures_in_a_row = 0
            except (openai.OpenAIError, MalformedResponse) as error:
                self._note_failure(key, error)
            progress.update()

    async def _ask(self, completions: AsyncCompletions, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, after as many attempts as it takes."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.endpoint.max_attempts),
            wait=self._choose_wait,
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                await self.limiter.acquire(estimate_tokens(body))
                start = time.monotonic()
                completion = await self._complete(completions, body)
                seconds = round(time.monotonic() - start, 3)
        return describe(completion, self._key) | {
            "seconds": seconds,
            "attempts": attempt.retry_state.attempt_number,
        }

    async def _complete(self, completions: AsyncCompletions, body: dict[str, Any]) -> ChatCompletion:
        # `extra_body`, so that endpoints of any version get what the request file says
        arguments = {"model": self.endpoint.model, "messages": body["messages"]}
        call = completions.create(**arguments, extra_body=body)
        try:  # the client's own timeout begins anew with each byte
            completion = await asyncio.wait_for(call, self.endpoint.timeout)
        except asyncio.TimeoutError as error:
            raise MalformedResponse(f"no complete response in {self.endpoint.timeout} s") from error
        except (ValueError, openai.APIResponseValidationError) as error:
            raise MalformedResponse(f"the response is not JSON of a chat completion: {error}") from error
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            raise MalformedResponse("the response is not a chat completion")
        return completion

    def _choose_wait(self, state: RetryCallState) -> float:
        """Seconds to the next attempt: what the endpoint asks for, else random and doubling."""
        asked = retry_after(state.outcome.exception())
        if asked is None:
            return wait_random_exponential(self.endpoint.backoff, max=LONGEST_BACKOFF)(state)
        self.limiter.hold(asked)
        return asked

    def _note_failure(self, key: str, error: Exception) -> None:
        reason = describe_error(error, self._key)
        self.outcome.failures[key] = reason
        self._failures_in_a_row += 1
        if is_hopeless(error) or self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.outcome.stopped = reason


def describe(completion: ChatCompletion, key: str) -> dict[str, Any]:
    """What the log keeps of a completion; a refusal is an answer, too, and was paid for."""
    choice, usage = completion.choices[0], completion.usage
    text = (choice.message and (choice.message.content or choice.message.refusal)) or ""
    return {
        "answer": str(text).replace(key, "***"),
        "finish_reason": choice.finish_reason,
        "usage": usage and usage.model_dump(mode="json", exclude_none=True, warnings=False),
        "served_model": completion.model,
    }


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, openai.APIStatusError):
        retried = error.status_code in RETRIED_STATUSES or error.status_code >= 500
        return retried and not is_hopeless(error)
    return isinstance(error, (openai.APIConnectionError, MalformedResponse))


def is_hopeless(error: BaseException) -> bool:
    """Whether no request can succeed any more."""
    if not isinstance(error, openai.APIStatusError):
        return False
    return error.status_code in HOPELESS_STATUSES or error.code == "insufficient_quota"


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the Retry-After header of a response asks for, given as a number or a date."""
    value = error.response.headers.get("retry-after") if isinstance(error, openai.APIStatusError) else None
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        seconds = (email.utils.parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None
    return max(0.0, seconds)


def describe_error(error: Exception, key: str) -> str:
    """One printable line without the key, which some endpoints repeat in their messages."""
    cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) else ""
    text = " ".join(f"{error}{cause}".replace(key, "***").split())
    return "".join(char for char in text if char.isprintable())[:500]
