"""Long prompts: the benchmark of what they cost, and buffers of exported models that are made once."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from script_tables import cells_by_row
from tiny_causal import greedy_causal, prompts, tiny_causal
from transformers import AutoTokenizer

from models import DecodeStats, ExitConfig, LoadedModel, prepare
from models.backends.shared import Shelf
from scripts import benchmark_prompt_length as benchmark

SHORT, LONG, NEW = 4, 30, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")
    tiny_causal(vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(*words):
    with (
        contextlib.redirect_stdout(io.StringIO()) as screen,
        contextlib.redirect_stderr(io.StringIO()) as log,
    ):
        try:
            benchmark.main([*words, "--new_tokens", str(NEW), "--rounds", "1"])
        except SystemExit:
            return log.getvalue()
    return screen.getvalue()


def test_every_method_after_both_lengths(folder, monkeypatch):
    lengths, layers, pairs = [], [], iter([1.0, 8.0, 2.0, 3.0] * 2)  # a row's pairs; the first round warms up

    def decode(loaded, prompt, streamer, exit_policy, max_new_tokens, **options):
        stats = options["decode_stats"] = DecodeStats()
        options |= {"exit_policy": exit_policy, "max_new_tokens": max_new_tokens}
        output = generate(loaded, prompt, streamer=streamer, **options)
        lengths.append((prompt.shape[1], output.shape[1] - prompt.shape[1]))
        layers.append(stats.exit_layers)
        assert len(streamer.times) == 1 + NEW, "the prompt, then token by token"
        gap = next(pairs)
        streamer.times = [0.0, 5.0, *(5.0 + gap * step / 1000 for step in range(1, NEW))]
        return output

    generate = benchmark.LoadedModel.generate
    monkeypatch.setattr(benchmark.LoadedModel, "generate", decode)
    output = run("--model", folder, "--backends", "torch", "--short", str(SHORT), "--long", str(LONG))
    rows = cells_by_row(output, "contestant")
    assert lengths == [(SHORT, NEW), (LONG, NEW)] * 4
    assert all(short == long for short, long in zip(layers[::2], layers[1::2], strict=True))
    assert {6} == {*layers[0][0]} and {2, 6} == {*layers[2][0]}, "full depth; the coin decides"
    assert [*rows] == ["torch, Full depth", "torch, FREE"]
    assert [*rows["torch, Full depth"].values()] == ["1.00", "8.00", "8.00"]
    assert [*rows["torch, FREE"].values()] == ["2.00", "3.00", "1.50"]


def test_the_prompts_pass_is_not_timed():
    clock = benchmark.Clock()
    clock.times = [0.0, 9.0, 9.5, 10.0]  # the prompt is shown, its pass takes 9 s, then two tokens
    assert clock.milliseconds == 500


def test_too_long_prompts_and_encoders_are_refused(folder):
    assert "has positions for 58 before --new_tokens" in run("--model", folder, "--long", "59")
    assert "has an encoder" in run("--model", "checkpoints/debian-t5-free", "--long", "20")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "w4"])  # whose prompts run in parts, and at once
def test_buffers_are_made_once_for_a_prompt_and_its_answer(precision, monkeypatch):
    model, capacities, lend = tiny_causal(max_position_embeddings=256), [], Shelf.lend

    loaded = prepare(LoadedModel(model, None, ExitConfig()), "onnx", precision)

    def counted(shelf, state, batch, capacity):
        capacities.append(capacity)
        return lend(shelf, state, batch, capacity)

    monkeypatch.setattr(Shelf, "lend", counted)
    inputs = prompts(2, length=126)
    options = {"max_new_tokens": 10, "do_sample": False, "min_new_tokens": 10}
    output = loaded.generate(**inputs, **options)
    assert capacities == [256], "128 would not hold the answer"
    if precision == "fp32":
        assert torch.equal(output, greedy_causal(model, inputs, **options))


def test_padded_prompts_longer_than_the_first_buffers():
    """64 tokens fill them, before the last one of the prompt makes them grow."""
    model = tiny_causal(max_position_embeddings=256)
    loaded = prepare(LoadedModel(model, None, ExitConfig()), "onnx")
    for length in (64, 65, 66):
        inputs = prompts(3, length=length)
        output = loaded.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(output, greedy_causal(model, inputs, max_new_tokens=4))
