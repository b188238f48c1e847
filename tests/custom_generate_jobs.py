"""Decodes by an exported repository, in a process that cannot import ours: jobs.json -> outputs.json."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers

assert importlib.util.find_spec("models") is None, "the repository can be imported"
torch.set_num_threads(1)


def decode(job: dict) -> dict:
    """Token ids and figures of a job, or the error that it ends with."""
    auto = transformers.AutoModelForSeq2SeqLM if job["encoder"] else transformers.AutoModelForCausalLM
    options, figures = dict(job["options"]), {}
    if job["repository"] is not None:  # else the model's own folder has the code
        options |= {"custom_generate": job["repository"], "trust_remote_code": True}
    model = load(auto, job["model"], job["repository"] is None)
    ids, mask = torch.tensor(job["input_ids"]), torch.tensor(job["attention_mask"])
    try:
        tokens = model.generate(ids, attention_mask=mask, decode_stats=figures, **options)
    except (ValueError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"tokens": tokens.tolist(), "exit_share": figures["exit_share"]}


@functools.cache
def load(auto: type, folder: str, has_code: bool) -> transformers.PreTrainedModel:
    own = {"trust_remote_code": True} if has_code else {}
    return auto.from_pretrained(folder, dtype=torch.float32, **own)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text())
    (folder / "outputs.json").write_text(json.dumps({name: decode(job) for name, job in jobs.items()}))
