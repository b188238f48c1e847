"""A `.gguf` file is parsed once for model and tokenizer, and says what it says to transformers alone."""

from __future__ import annotations

import threading

import gguf
import pytest
import torch
from test_causal_gguf import write_gguf
from tiny_causal import tiny_causal
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import UserError, load_model


@pytest.fixture
def file(tmp_path):
    model = tiny_causal("llama-untied", vocab_size=300, attention_bias=False, eos_token_id=2, bos_token_id=1)
    write_gguf(model, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def parses(monkeypatch):
    """The paths that the package's reader has opened."""
    paths = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, *args):
            paths.append(str(path))
            super().__init__(path, *args)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    return paths


def test_one_parse_says_what_transformers_reads_by_three(file, parses):
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert len(parses) >= 3
    parses.clear()
    loaded = load_model(str(file))
    assert parses == [str(file)]
    weights = loaded.model.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in theirs.state_dict().items())
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    text = "▁7 ▁70 Bytes: é"
    assert loaded.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_file_that_has_changed_is_parsed_anew(file, parses):
    reader = gguf.GGUFReader
    first = load_model(str(file)).model.get_input_embeddings().weight
    other = tiny_causal("llama-untied", vocab_size=300, attention_bias=False, seed=1)
    write_gguf(other, file)
    second = load_model(str(file)).model.get_input_embeddings().weight
    assert torch.equal(second, other.get_input_embeddings().weight) and not torch.equal(first, second)
    assert parses == [str(file)] * 2 and gguf.GGUFReader is reader


def test_the_packages_reader_is_back_after_a_failure(file):
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="Cannot load a model from"):
        load_model(str(file))
    assert gguf.GGUFReader is reader and gguf.get_tensor_name_map is names


def test_threads_that_load_at_once_leave_the_packages_reader(file):
    reader, found = gguf.GGUFReader, []
    threads = [threading.Thread(target=lambda: found.append(load_model(str(file)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and gguf.GGUFReader is reader
