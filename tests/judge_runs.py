"""Inputs and command lines of the judge."""

from __future__ import annotations

import json

from gpt_eval.__main__ import main
from gpt_eval.judgements import read_requests

SECRET = "sk-never-written-0123456789"
FAST = ["--requests_per_minute", "600000", "--tokens_per_minute", "1000000000", "--backoff", "0.02"]
RATINGS = '{"relevance": 4, "informativeness": 3, "fluency": 5, "coherence": 2}'


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def write_inputs(folder, count, first="good {}", second="bad {}"):
    names = [f"s{index}" for index in range(count)]
    write_rows(folder / "source.jsonl", [{"id": name, "document": f"good source {name}"} for name in names])
    for system, text in (("free", first), ("full", second)):
        rows = [{"id": name, "prediction": text.format(name), "tokens": 2} for name in names]
        write_rows(folder / f"{system}.jsonl", rows)


def make_flags(folder, *flags, systems=("free", "full")):
    predictions = [f"{name}={folder / f'{name}.jsonl'}" for name in systems]
    source = ["--source_file", str(folder / "source.jsonl")]
    requests = ["--requests", str(folder / "requests.jsonl")]
    return ["make", *requests, "--predictions", *predictions, *source, *flags]


def run_flags(folder, server, *flags):
    files = ["--requests", str(folder / "requests.jsonl"), "--answers", str(folder / "answers.jsonl")]
    return ["run", *files, "--model", "judge", "--base_url", server.base_url, *FAST, *flags]


def make(folder, count, *flags, **texts):
    write_inputs(folder, count, **texts)
    assert main(make_flags(folder, *flags)) == 0
    return read_requests(folder / "requests.jsonl")


def answers_of(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
