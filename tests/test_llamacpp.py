"""llama.cpp beside our methods, on the same .gguf file."""

from __future__ import annotations

import sys

import pytest
import torch
from test_causal_gguf import write_gguf
from tiny_causal import greedy_causal, tiny_causal

from models import load_model
from models.errors import UserError
from scripts.benchmarking import llamacpp
from scripts.benchmarking.causal import Prompt, llama_cpp_contestants

TOKENS = 12
SETTINGS = {"vocab_size": 300, "attention_bias": False, "eos_token_id": 2, "bos_token_id": 1}


@pytest.fixture
def written(tmp_path):
    """A tiny Llama in float32, and its file."""
    model, path = tiny_causal("llama-untied", **SETTINGS), tmp_path / "tiny.gguf"
    write_gguf(model, path)
    return model, path


def enter(path, texts):
    return llama_cpp_contestants(str(path), load_model(str(path)), texts, TOKENS)


def test_it_decodes_what_hugging_face_does_prompt_after_prompt(written):
    pytest.importorskip("llama_cpp")
    model, path = written
    texts = [Prompt("", {"input_ids": torch.tensor([ids])}) for ids in ([1, 5, 9], [1, 5, 9, 280], [1, 5])]
    (contestant,) = enter(path, texts)
    for prompt in texts:
        ids = prompt.inputs["input_ids"]
        expected = greedy_causal(model, {"input_ids": ids}, max_new_tokens=TOKENS)
        answer = contestant.decode(prompt, TOKENS)
        assert torch.equal(answer.sequences, expected)
        assert answer.tokens == expected[0, ids.shape[1] :].tolist()


class FakeLlama:
    """Counts up from the prompt's last token; remembers what it was asked."""

    def __init__(self, path, **options):
        self.path, self.options, self.held = path, options, []

    def reset(self):
        self.held = []

    def generate(self, prompt, temp):
        assert temp == 0.0 and not self.held, "greedy, and from an empty cache"
        self.held = [*prompt]
        while True:
            self.held.append(self.held[-1] + 1)
            yield self.held[-1]


def test_an_answer_ends_with_the_end_or_at_its_length(written, monkeypatch):
    fake = type("llama_cpp", (), {"Llama": FakeLlama})
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    generate = llamacpp.open_generator(written[1], {7}, context=20, threads=1)
    assert generate([3, 4], 12) == [5, 6, 7]
    assert generate([9], 2) == [10, 11]


def test_it_is_left_out_without_its_package_or_file(written, monkeypatch):
    _, path = written
    monkeypatch.setattr(llamacpp, "is_installed", lambda: False)
    assert enter(path, []) == []
    monkeypatch.setattr(llamacpp, "is_installed", lambda: True)
    assert llama_cpp_contestants(str(path.parent), load_model(str(path)), [], TOKENS) == []


def test_an_installation_that_lacks_something_is_named(monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("import diskcache_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    with pytest.raises(UserError, match=r"No module named 'diskcache_that_is_missing'.*install it again"):
        llamacpp.open_generator(tmp_path / "x.gguf", {7}, context=20, threads=1)
