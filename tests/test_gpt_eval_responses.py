"""Responses that are no plain answer, over HTTP: retried, kept with a reason, or stopped; never half-read."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import re
from types import SimpleNamespace
from urllib.parse import quote

import openai
import pytest

from gpt_eval.answer_log import AnswerLog, read_answers
from gpt_eval.client import Endpoint, ask_all, status_and_codes
from gpt_eval.cost import spent
from gpt_eval.rate_limit import RateLimiter
from gpt_eval.redaction import Redactor, redacted_logs
from gpt_eval.responses import ResponseError, is_hopeless, is_transient, read_completion
from gpt_eval.stand_in_server import StandInServer
from gpt_eval.verdicts import count_states, read_verdicts

SECRET = "sk-never/written+0123&456'789"
VERDICT = '{"better": "tie"}'
USAGE = {"prompt_tokens": 10, "completion_tokens": 7}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def completion(content=VERDICT, finish_reason="stop", usage=USAGE, message=None, **choice):
    message = {"role": "assistant", "content": content} | (message or {})
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason} | choice]
    return {"id": "1", "object": "chat.completion", "model": "m", "choices": choices, "usage": usage}


def ask(folder, *responses, max_attempts=3):
    """What one request comes to if the endpoint sends these responses in turn, the last for ever."""
    queue = list(responses)
    body = {"messages": [{"role": "user", "content": "Better?"}]}
    with StandInServer(answer=lambda _: queue.pop(0) if len(queue) > 1 else queue[0]) as server:
        endpoint = Endpoint(server.base_url, "judge", max_attempts=max_attempts, backoff=0.001)
        with AnswerLog(folder / "answers.jsonl", "judge") as log:
            outcome = ask_all({"k": body}, endpoint, RateLimiter(1e6, 1e9), log)
    return outcome, read_answers(folder / "answers.jsonl").get("k"), len(server.calls)


ERROR_502 = {"error": {"message": "upstream is down", "code": 502}}
HTML_PAGE = b"<!DOCTYPE html><html><title>Just a moment</title></html>"
BROKEN_OFF = completion('{"bet', "error", error={"message": "provider died", "code": 502})


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (ERROR_502, "upstream is down"),
        ({"error": "model overloaded"}, "model overloaded"),
        ({"error": {"message": "slow down", "type": "rate_limit_error"}, "choices": []}, "slow down"),
        ({"object": "error", "message": "engine restarts", "code": 503}, "engine restarts"),
        (BROKEN_OFF, "provider died"),
        (completion("Summ", "error"), "broke the answer off"),
        (HTML_PAGE, "not JSON: '<!DOCTYPE html><html><title>Just a moment"),
        (b"", "not JSON: ''"),
        (b'{"choices": [{"mess', "not JSON: '{\"choices\""),
        (b"[" * 100_000, "not JSON"),
        (b"[]", r"not a chat completion: '\[\]'"),
        ({"id": "1", "model": "m"}, "no choices"),
        ({"choices": None}, "no choices"),
        ({"choices": [None]}, "no choices"),
        ({"choices": [{"finish_reason": "stop"}]}, "no message"),
        (completion("", usage=None), r"the answer is empty \(finish_reason stop\)"),
        (completion(None, usage={"prompt_tokens": 3, "completion_tokens": 0}), "the answer is empty"),
        (completion([{"type": "text", "text": " "}], usage=None), "the answer is empty"),
    ],
)  # fmt: skip
def test_transient_responses_are_asked_again_and_leave_their_reason(tmp_path, response, reason):
    outcome, record, calls = ask(tmp_path, response, completion())
    assert (record["answer"], record["attempts"], calls, outcome.failures) == (VERDICT, 2, 2, {})
    other = tmp_path / "other"
    outcome, record, calls = ask(other, response)
    assert record is None and calls == 3 and outcome.stopped is None
    assert re.search(reason, outcome.failures["k"])


@pytest.mark.parametrize(
    ("response", "stops"),
    [
        ({"error": {"message": "no such prompt", "type": "invalid_request_error"}}, False),
        ({"error": {"message": "no such prompt", "code": 400}}, False),
        ({"error": {"message": "no such prompt", "code": "400"}}, False),
        ({"error": {"message": "no such prompt", "code": 402}}, True),
        ({"error": {"message": "no such prompt", "code": "insufficient_quota"}}, True),
        ({"error": {"message": "no such prompt", "code": 429, "type": "insufficient_quota"}}, True),
        (402, True),
        (403, True),
        ({"error": {"message": "no such prompt", "code": 403}}, True),
        ({"error": {"message": "no such prompt", "code": 403, "metadata": {"flagged_input": "x"}}}, False),
        ({"error": {"message": "no such prompt", "code": "content_filter", "status": 403}}, False),
    ],
)
def test_final_errors_are_asked_once(tmp_path, response, stops):
    outcome, record, calls = ask(tmp_path, response, completion())
    assert record is None and calls == 1
    assert ("no such prompt" in outcome.failures["k"] or response in (402, 403)) and (
        bool(outcome.stopped) == stops
    )


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "Summary 0, as ..."}]}


@pytest.mark.parametrize("metadata", [None, {"reasons": ["violence"], "flagged_input": "a gun"}])
def test_a_flagged_text_is_no_reason_to_stop(metadata):
    """OpenRouter's moderation answers with status 403, as a wrong key does."""
    response = SimpleNamespace(status_code=403, request=None, headers={})
    error = openai.PermissionDeniedError("no", response=response, body={"code": 403, "metadata": metadata})
    status, codes = status_and_codes(error)
    assert is_hopeless(status, codes) == (metadata is None) and not is_transient(status, codes)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([THOUGHT, {"type": "text", "text": VERDICT}], VERDICT),
        ([{"type": "text", "text": '{"better":'}, {"type": "output_text", "text": ' "tie"}'}], VERDICT),
        ([{"type": "reasoning", "text": "hm"}, {"text": VERDICT}], VERDICT),
        (["Summary", " 1"], "Summary 1"),
        ({"type": "text", "text": VERDICT}, VERDICT),
        ({"better": "tie"}, VERDICT),
        ("Summ", "Summ"),
    ],
)
def test_parts_of_content_are_read_without_the_thinking(tmp_path, content, answer):
    _, record, calls = ask(tmp_path, completion(content))
    assert record["answer"] == answer and record["usage"] == USAGE and calls == 1
    assert read_completion("\ufeff" + json.dumps(completion(content, "length")))["answer"] == answer


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (completion(None, message={"refusal": "I must not"}), "refused: I must not"),
        (completion([{"type": "refusal", "refusal": "No."}]), "refused: No."),
        (completion("", "content_filter", usage=None), "withheld by the endpoint's content filter"),
        (completion("", "length", usage=None), "cut off at --max_tokens before any text"),
        (completion([THOUGHT], "length"), "cut off at --max_tokens before any text"),
        (completion([THOUGHT]), "no text among its 7 tokens"),
        (completion(None, "tool_calls", message={"tool_calls": [{}]}), "a tool call instead of a text"),
    ],
)
def test_silence_that_was_paid_for_is_kept_with_its_reason_and_not_paid_again(tmp_path, response, reason):
    outcome, record, calls = ask(tmp_path, response)
    assert record["answer"] is None and record["reason"].startswith(reason)
    assert record["usage"] == response["usage"] and calls == 1 and not outcome.failures
    assert ask(tmp_path, response)[2] == 0
    request = {"key": "k", "judgement": "pairwise", "id": "1", "systems": ["a", "b"], "repeat": 0}
    judged = read_verdicts("judge", [request], {"k": record})
    assert count_states(judged)["refused"] == 1 and judged[0].verdict is None


def test_tokens_of_failed_attempts_are_counted(tmp_path):
    _, record, _ = ask(tmp_path, BROKEN_OFF, BROKEN_OFF, completion())
    assert spent([record], (None, None)) == "30 prompt and 21 answer tokens"
    outcome, _, _ = ask(tmp_path / "other", BROKEN_OFF)
    assert outcome.lost == [USAGE] * 3
    with pytest.raises(ResponseError):
        read_completion(json.dumps({"usage": {"prompt_tokens": "many"}}))


# The key


def encodings(text):
    """The key as endpoints, proxies and libraries write it into messages."""
    zero_width = "\u200b".join(text)
    return {
        "plain": text,
        "zero width": zero_width,
        "one soft hyphen": text[:5] + "\xad" + text[5:],
        "wrapped": text[:9] + "\r\n\t" + text[9:],
        "byte order marks": "\ufeff".join(text),
        "url": quote(text, safe=""),
        "url, every character": "".join(f"%{byte:02x}" for byte in text.encode()),
        "url twice": quote(quote(text, safe=""), safe=""),
        "url of zero width": quote(zero_width, safe=""),
        "json": json.dumps(text).strip('"'),
        "json, every character": "".join(f"\\u{ord(char):04X}" for char in text),
        "json of zero width": json.dumps(zero_width).strip('"'),
        "python": repr(text)[1:-1],
        "html": html.escape(text),
        "html twice": html.escape(html.escape(text)),
        "html, every character": "".join(f"&#{ord(char)};" for char in text),
        "html, hexadecimal": "".join(f"&#x{ord(char):x};" for char in text),
        "base64": base64.b64encode(text.encode()).decode(),
        "base64, basic": base64.b64encode(f":{text}".encode()).decode(),
        "base64, user": base64.b64encode(f"me:{text}".encode()).decode(),
        "base64 for urls": base64.urlsafe_b64encode(f"Bearer {text}\n".encode()).decode(),
    }


@pytest.mark.parametrize("name", encodings(SECRET))
def test_the_key_is_redacted_in_every_encoding(name):
    text = encodings(SECRET)[name]
    assert Redactor(SECRET)(f"denied: {text} for you") == "denied: *** for you"


def test_other_texts_stay():
    redact = Redactor(SECRET)
    text = f"{SECRET[:-1]}, %2D \\u0041 &amp; {base64.b64encode(b'another text of some length').decode()}"
    assert redact(text) == text
    assert Redactor("EMPTY")("EMPTY is 1") == "EMPTY is 1"  # a word for servers that take any key


@pytest.mark.slow
def test_no_file_error_or_log_holds_the_key(tmp_path):
    """In error objects, refusals, names of models and what libraries log."""
    for index, text in enumerate(encodings(SECRET).values()):
        error, _, _ = ask(tmp_path / f"{index}", {"error": {"message": f"key {text} denied", "code": 400}})
        assert "***" in error.failures["k"] and "0123" not in error.failures["k"]
    hidden = "\u200b".join(SECRET)
    refused = completion(None, finish_reason=hidden, message={"refusal": hidden}) | {"model": hidden}
    _, record, _ = ask(tmp_path, refused)
    assert [record[name] for name in ("reason", "finish_reason", "served_model")] == [
        "refused: ***",
        "***",
        "***",
    ]
    handler = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger().addHandler(handler)
    try:
        with redacted_logs(Redactor(SECRET)):
            try:
                raise RuntimeError(f"sent {quote(SECRET)}")
            except RuntimeError:
                logging.getLogger("httpx").exception("headers %s", {"authorization": f"Bearer {hidden}"})
    finally:
        logging.getLogger().removeHandler(handler)
    written = stream.getvalue()
    assert "Bearer ***" in written and "RuntimeError: sent ***" in written and "0123" not in written
