"""Request files: one line a question to the judge, made from samples and prompts.

A line has `key` (hash of the body), `judgement` (likert or pairwise), `id`, `systems` (in the order shown),
`repeat` and `body` (all of the chat completion's arguments but the model). Questions with the same body have
the same key: they are asked once and share the answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from gpt_eval.flags import MakeArguments
from gpt_eval.parsing import schema
from gpt_eval.predictions import Sample, read_rows
from models.errors import UserError
from models.json_files import read_text
from util.files import write_json_lines

FIELDS = {"likert": {"source", "summary"}, "pairwise": {"source", "summary_0", "summary_1"}}
REQUEST_FIELDS = {"key", "judgement", "id", "systems", "repeat", "body"}


@dataclass(frozen=True)
class Prompt:
    """Text of the user's message with `$source` and other fields; the system's message may be empty."""

    user: Template
    system: str

    def messages(self, **fields: str) -> list[dict[str, str]]:
        user = {"role": "user", "content": self.user.substitute(fields)}  # one pass: `$` in texts stays
        return [{"role": "system", "content": self.system}, user] if self.system else [user]


def load_prompt(folder: Path, judgement: str) -> Prompt:
    """The prompt in `<judgement>.txt` and, where there is one, `<judgement>_system.txt`.

    Raises:
        UserError: there is no such file, or its fields are not those of the judgement.
    """
    path, system = folder / f"{judgement}.txt", folder / f"{judgement}_system.txt"
    if not path.is_file():
        raise UserError(f"--prompts: there is no file {path}.")
    text = read_text(path, "--prompts").strip()
    found = {match["named"] or match["braced"] or match[0] for match in Template.pattern.finditer(text)}
    fields = FIELDS[judgement]
    if found - {"$$"} != fields:
        wanted = ", ".join(f"${name}" for name in sorted(fields))
        raise UserError(f"{path}: use exactly the fields {wanted}; write a dollar sign as $$.")
    return Prompt(Template(text), read_text(system, "--prompts").strip() if system.is_file() else "")


def build_requests(samples: list[Sample], flags: MakeArguments) -> Iterator[dict[str, Any]]:
    """Every question: each output for Likert, both orders for pairwise, each `--repeats` times."""
    prompts = {judgement: load_prompt(flags.prompts, judgement) for judgement in flags.judgements}
    for repeat in range(flags.repeats):
        for judgement, prompt in prompts.items():
            for sample in samples:
                for systems in shown_systems(judgement, list(sample.outputs)):
                    body = build_body(judgement, prompt, sample, systems, repeat, flags)
                    yield {
                        "key": hash_body(body),
                        "judgement": judgement,
                        "id": sample.id,
                        "systems": systems,
                        "repeat": repeat,
                        "body": body,
                    }


def shown_systems(judgement: str, systems: list[str]) -> list[list[str]]:
    return [[name] for name in systems] if judgement == "likert" else [systems, systems[::-1]]


def build_body(
    judgement: str, prompt: Prompt, sample: Sample, systems: list[str], repeat: int, flags: MakeArguments
) -> dict[str, Any]:
    """Arguments of one chat completion; `--body` overrides any of them, null leaves one out."""
    names = ["summary"] if judgement == "likert" else ["summary_0", "summary_1"]
    shown = {name: sample.outputs[system] for name, system in zip(names, systems, strict=True)}
    body = {
        "messages": prompt.messages(source=sample.source, **shown),
        "temperature": flags.temperature,
        "max_tokens": flags.max_tokens,
        "seed": flags.seed + repeat,  # also what tells repeats apart
    }
    if flags.structured_output == "json_schema":
        body["response_format"] = {"type": "json_schema", "json_schema": schema(judgement)}
    elif flags.structured_output == "json_object":
        body["response_format"] = {"type": "json_object"}
    body |= flags.body or {}
    return {name: value for name, value in body.items() if value is not None}


def hash_body(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_requests(path: Path, requests: list[dict[str, Any]]) -> None:
    """Replace the file as a whole, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, requests)


def read_requests(path: Path) -> list[dict[str, Any]]:
    """Requests of a file that `make` wrote.

    Raises:
        UserError: a line is not a request, or its body is no longer the one that its key was made of.
    """
    requests = []
    for place, request in read_rows(path):
        if set(request) != REQUEST_FIELDS or request["key"] != hash_body(request["body"]):
            raise UserError(f"{place}: not a request as `make` writes it; make it again.")
        requests.append(request)
    if not requests:
        raise UserError(f"{path}: there are no requests.")
    return requests
