"""A stand-in for an OpenAI-compatible endpoint, on loopback, that fails on demand.

It is no language model: it rates a summary by the share of its words that the source has. Each distinct
request may meet one fault, drawn from its text and so the same in every run; asked again, it is answered.

    with StandInServer(fault_rate=0.2) as server:
        print(server.base_url)
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

FAULTS = ("rate_limit", "server_error", "slow", "drop", "malformed", "cut_body")


class StandInServer:
    """Serves /v1/chat/completions from a thread. `calls` lists what came: time, prompt, outcome.

    Args:
        fault_rate: share of requests that meet a fault first.
        faults: the faults to choose from.
        retry_after: seconds, in the header of a rate limit's response.
        delay: seconds to every answer; `slow` adds `slow_delay`.
        answer: what to say to a prompt instead of a rating; a status code answers with that error, a dict or
            bytes are sent as the whole response.
    """

    def __init__(
        self,
        fault_rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        retry_after: float = 0.05,
        delay: float = 0.0,
        slow_delay: float = 1.0,
        answer: Callable[[str], str | int | dict[str, Any] | bytes] | None = None,
    ) -> None:
        self.fault_rate = fault_rate
        self.faults = faults
        self.retry_after = retry_after
        self.delay = delay
        self.slow_delay = slow_delay
        self.answer = answer or rate
        self.calls: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self._seen: set[str] = set()
        self._http = QuietServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stand_in": self}))
        waits = {"poll_interval": 0.01}  # to be shut down
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs=waits, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> StandInServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def choose_fault(self, text: str) -> str | None:
        """The fault that the first request with this text meets, if any."""
        with self.lock:
            first = text not in self._seen
            self._seen.add(text)
        draw = random.Random(text)
        return draw.choice(self.faults) if first and draw.random() < self.fault_rate else None


class QuietServer(ThreadingHTTPServer):
    """Clients that vanish in the middle of an answer are part of the test."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    """One connection; `stand_in` is set by the server."""

    stand_in: StandInServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        arrived = time.monotonic()
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.loads(text)
        prompt = body["messages"][-1]["content"]
        fault = self.stand_in.choose_fault(text)
        call = {"time": arrived, "text": text, "prompt": prompt, "outcome": fault or "answer"}
        with self.stand_in.lock:
            self.stand_in.calls.append(call)
        time.sleep(self.stand_in.delay + (self.stand_in.slow_delay if fault == "slow" else 0))
        if fault is None or fault == "slow":
            self.respond(body, prompt)
        else:
            getattr(self, fault)()

    def respond(self, body: dict[str, Any], prompt: str) -> None:
        said = self.stand_in.answer(prompt)
        if isinstance(said, int):  # some servers repeat the key in their messages, so this one does
            self.send(said, {"error": {"message": f"{said} for {self.headers['Authorization']}"}})
            return
        if isinstance(said, dict | bytes):
            self.send(200, said)
            return
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(said) // 4}
        completion = {
            "id": "stand-in",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            ],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        self.send(200, completion)

    def rate_limit(self) -> None:
        error = {"error": {"message": "rate limit reached"}}
        self.send(429, error, {"Retry-After": str(self.stand_in.retry_after)})

    def server_error(self) -> None:
        self.send(500, {"error": {"message": "internal error"}})

    def drop(self) -> None:
        self.close_connection = True

    def malformed(self) -> None:
        self.send(200, '{"choices": [{"message": ')

    def cut_body(self) -> None:
        self.send(200, '{"choices": [', {"Content-Length": "1000"})
        self.close_connection = True

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        data = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (defaults | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `calls` keeps what matters."""


def rate(prompt: str) -> str:
    """An answer in the form asked for, from the paper's prompts."""
    source, *summaries = re.split(r"\nSummary(?: [01])?: ", prompt.partition("\nArticle: ")[2])
    known = set(source.lower().split())
    shares = [
        sum(word in known for word in words) / len(words)
        for words in map(str.split, map(str.lower, summaries))
    ]
    if len(shares) == 1:
        rating = 1 + round(4 * shares[0])
        names = ("relevance", "informativeness", "fluency", "coherence")
        return json.dumps({name: max(1, rating - place % 2) for place, name in enumerate(names)})
    better = "tie" if shares[0] == shares[1] else f"Summary {int(shares[1] > shares[0])}"
    return json.dumps({"better": better})
