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
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.resources.chat import AsyncCompletions
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

from gpt_eval.answer_log import AnswerLog
from gpt_eval.cost import add_usage, estimate_tokens
from gpt_eval.rate_limit import RateLimiter
from gpt_eval.redaction import Redactor, redacted_logs
from gpt_eval.responses import ResponseError, codes_in, is_hopeless, is_transient, read_completion
from models.errors import UserError
from util.progress import Progress

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_FAILURES_IN_A_ROW = 20
LONGEST_BACKOFF = 60.0
LONGEST_HOLD = 600.0  # that an endpoint may ask for: longer, and the run ends, to be continued later


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
    """`failures` maps keys to reasons; `stopped` says why the rest was not sent; `lost` is the usage of
    responses without an answer to requests that failed."""

    failures: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None
    lost: list[dict[str, Any]] = field(default_factory=list)


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
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"--base_url: leave out user, password, query and fragment; the key comes from {KEY_VARIABLE}."
        )


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
        self._redact = Redactor(key)
        self._failures_in_a_row = 0

    async def send(self, pending: dict[str, dict[str, Any]]) -> Outcome:
        """Ask everything, or stop early where going on is hopeless."""
        options: dict[str, Any] = {
            "base_url": self.endpoint.base_url,
            "timeout": self.endpoint.timeout,
            "max_retries": 0,
        }
        queue = iter(pending.items())
        progress_bar = Progress("Asking", len(pending), "request")
        with redacted_logs(self._redact), progress_bar as progress:
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
            except (openai.OpenAIError, ResponseError) as error:
                self._note_failure(key, error)
            progress.update()

    async def _ask(self, completions: AsyncCompletions, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, after as many attempts as it takes; its usage is that of all of them."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.endpoint.max_attempts),
            wait=self._choose_wait,
            retry=retry_if_exception(may_succeed_later),
            reraise=True,
        )
        lost: list[dict[str, Any]] = []
        try:
            async for attempt in retrying:
                with attempt:
                    await self.limiter.acquire(estimate_tokens(body))
                    start = time.monotonic()
                    record = await self._complete(completions, body, lost)
                    seconds = round(time.monotonic() - start, 3)
        except (openai.OpenAIError, ResponseError):
            self.outcome.lost += lost
            raise
        return self._redact.every_text(record) | {
            "usage": add_usage([*lost, record["usage"]]) if lost else record["usage"],
            "seconds": seconds,
            "attempts": attempt.retry_state.attempt_number,
        }

    async def _complete(
        self, completions: AsyncCompletions, body: dict[str, Any], lost: list[dict[str, Any]]
    ) -> dict[str, Any]:
        # `extra_body`, so that endpoints of any version get what the request file says
        arguments = {"model": self.endpoint.model, "messages": body["messages"]}
        call = completions.with_raw_response.create(**arguments, extra_body=body)
        try:  # the client's own timeout begins anew with each byte
            response = await asyncio.wait_for(call, self.endpoint.timeout)
        except TimeoutError as error:
            raise ResponseError(f"no complete response in {self.endpoint.timeout} s") from error
        try:
            return read_completion(response.text)
        except ResponseError as error:
            error.headers = response.headers
            lost += [error.usage] if error.usage else []
            raise

    def _choose_wait(self, state: RetryCallState) -> float:
        """Seconds to the next attempt: what the endpoint asks for, else random and doubling."""
        assert state.outcome is not None  # an attempt has failed
        asked = retry_after(state.outcome.exception())
        if asked is None:
            return wait_random_exponential(self.endpoint.backoff, max=LONGEST_BACKOFF)(state)
        self.limiter.hold(asked)
        return asked

    def _note_failure(self, key: str, error: Exception) -> None:
        reason = describe_error(error, self._redact)
        self.outcome.failures[key] = reason
        self._failures_in_a_row += 1
        hopeless = asks_too_long(error)
        if hopeless:
            reason += f" (the endpoint asks to wait {retry_after(error):,.0f} s)"
        elif isinstance(error, (openai.APIStatusError, ResponseError)):
            hopeless = is_hopeless(*status_and_codes(error))
        if hopeless or self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.outcome.stopped = reason


def may_succeed_later(error: BaseException) -> bool:
    """Whether the same request is worth another attempt."""
    if asks_too_long(error):
        return False
    return isinstance(error, openai.APIConnectionError) or (
        isinstance(error, (openai.APIStatusError, ResponseError)) and is_transient(*status_and_codes(error))
    )


def asks_too_long(error: BaseException) -> bool:
    """Whether the endpoint asks for a wait of hours, as where a day's quota is spent."""
    return (retry_after(error) or 0.0) > LONGEST_HOLD


def status_and_codes(error: openai.APIStatusError | ResponseError) -> tuple[int | None, frozenset[str]]:
    if isinstance(error, ResponseError):
        return error.status, error.codes
    return error.status_code, codes_in(error.body)


def retry_after(error: BaseException | None) -> float | None:
    """Seconds that the Retry-After header of a response asks for, given as a number or a date."""
    if isinstance(error, openai.APIStatusError):
        value = error.response.headers.get("retry-after")
    else:
        value = error.headers.get("retry-after") if isinstance(error, ResponseError) else None
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        seconds = (email.utils.parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None
    return max(0.0, seconds)


def describe_error(error: Exception, redact: Redactor) -> str:
    """One printable line without the key, which some endpoints repeat in their messages."""
    cause = f" ({error.__cause__})" if isinstance(error, openai.APIConnectionError) else ""
    text = " ".join(redact(f"{error}{cause}").split())
    return "".join(char for char in text if char.isprintable())[:500]
