"""The demo page without its page: outputs as they grow, what is refused, HTML, several requests at once."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

from models import (
    Calm,
    DecodeStats,
    Free,
    FullDepth,
    SoftmaxGap,
    StaticExit,
    UserError,
    attach_exit_adapter,
    early_exit_decode,
    load_model,
    make_exit_adapter,
    save_exit_adapter,
    view_for,
)
from scripts import demo
from util.demo import comparison
from util.demo.comparison import compare, paced
from util.demo.examples import embedded_checkpoints, examples_for
from util.demo.request import Limits, Request, encode
from util.demo.session import Choice, Session
from util.demo.transcript import State
from util.demo_arguments import DemoArguments

ROOT = Path(__file__).resolve().parent.parent
FREE, LLAMA, CALM = (str(ROOT / "checkpoints" / name) for name in (
    "debian-t5-free", "debian-llama-free", "debian-t5-calm"))  # fmt: skip
BUS = "Filternder D-Bus-Proxy - Tests für installierte Pakete"  # of which lossless takes drafts back
THRESHOLD, LAYER, LENGTH = 0.3, 2, 40
POLICIES = {
    "Full depth": lambda: FullDepth(),
    "Static": lambda: StaticExit(LAYER),
    "CALM": lambda: Calm(SoftmaxGap(), THRESHOLD, min_layer=LAYER),
    "FREE": lambda: Free(LAYER, SoftmaxGap(), THRESHOLD),
    "FREE lossless": lambda: Free(LAYER, SoftmaxGap(), THRESHOLD, lossless=True),
}
SESSION = Session()


def ask(method="FREE lossless", text=BUS, **changes):
    settings = {"threshold": THRESHOLD, "shallow_layer": LAYER, "max_pending": 0, "max_new_tokens": LENGTH}
    return Request(text, method, **settings | changes)


def finish(choice, request):
    steps = compare(SESSION.open(choice), request, Limits())
    return [*steps][-1]


def inputs_of(checkpoint, tokenizer, text=BUS):
    """As the checkpoint's card says: prompts lack the end token, which this tokenizer does not add."""
    prompt = f"{text}\n\nTranslation:" if checkpoint == LLAMA else text
    return tokenizer(prompt, return_tensors="pt")


def generated(output, inputs, checkpoint):
    return output[0, inputs["input_ids"].shape[1] if checkpoint == LLAMA else 1 :]


# Outputs as they grow


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [FREE, LLAMA])
@pytest.mark.parametrize("method", POLICIES)
def test_outputs_and_figures_are_those_of_generate(checkpoint, method):
    shown = finish(Choice(checkpoint), ask(method))
    loaded, stats = load_model(checkpoint), DecodeStats()
    inputs = inputs_of(checkpoint, loaded.tokenizer)
    options = {"max_new_tokens": LENGTH, "do_sample": False}
    own = {"custom_generate": early_exit_decode, "exit_policy": POLICIES[method](), "decode_stats": stats}
    output = generated(loaded.model.generate(**inputs, **options, **own), inputs, checkpoint)
    full = generated(loaded.model.generate(**inputs, **options), inputs, checkpoint)  # Hugging Face's loop
    assert [token.token for token in shown.method.kept] == output.tolist()
    assert shown.method.text == loaded.tokenizer.decode(output, skip_special_tokens=True)
    assert [token.token for token in shown.full.kept] == full.tolist()
    assert [token.layer for token in shown.method.kept] == stats.exit_layers[0]
    assert shown.method.average_layers == stats.average_layers
    assert shown.method.exit_share == stats.exit_share
    assert shown.method.taken_back == stats.retracted_tokens
    assert {token.layer for token in shown.full.kept} == {8}
    assert shown.method.ended and shown.full.ended and shown.method.seconds > 0


def test_drafts_are_shown_before_they_are_taken_back():
    """All that stands at the end is Hugging Face's output; before, drafts came and went."""
    pictures = []
    for shown in compare(SESSION.open(Choice(FREE)), ask(), Limits()):
        pictures.append([(token.token, token.state) for token in shown.method.tokens])
    loaded = load_model(FREE)
    inputs = inputs_of(FREE, loaded.tokenizer)
    expected = loaded.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0, 1:].tolist()
    assert [token for token, state in pictures[-1] if state is State.STANDS] == expected
    gone = [place for place, (_, state) in enumerate(pictures[-1]) if state is State.TAKEN_BACK]
    assert gone
    for place in gone:
        states = [picture[place][1] for picture in pictures if place < len(picture)]
        assert states[0] is State.DRAFT and State.STANDS not in states


def test_a_cap_on_waiting_tokens_makes_passes():
    capped = finish(Choice(FREE), ask("FREE", threshold=0.0, max_pending=2))
    layers = [token.layer for token in capped.method.kept]
    assert layers == ([2, 2, 8] * LENGTH)[: len(layers)]


@pytest.mark.parametrize("method", ["FREE", "CALM"])
def test_tokens_that_exit_were_more_confident_than_the_threshold(method):
    tokens = finish(Choice(FREE), ask(method, threshold=0.6)).method.kept
    assert {token.layer < 8 for token in tokens} == {True, False}
    assert all((token.confidence > 0.6) == (token.layer < 8) for token in tokens)


def test_what_the_last_layer_says_is_hugging_faces_forward_pass():
    shown = finish(Choice(FREE), ask("Static"))
    loaded = load_model(FREE)
    tokens = [token.token for token in shown.method.kept]
    decoder_ids = torch.tensor([[loaded.model.config.decoder_start_token_id, *tokens[:-1]]])
    with torch.no_grad():
        logits = loaded.model(**inputs_of(FREE, loaded.tokenizer), decoder_input_ids=decoder_ids).logits
    said = logits[0].argmax(-1).tolist()
    assert shown.traced and said != tokens
    assert [token.full_depth for token in shown.method.kept] == [
        loaded.tokenizer.decode([one]) for one in said
    ]
    assert [token.agrees for token in shown.method.kept] == [
        a == b for a, b in zip(said, tokens, strict=True)
    ]


@pytest.mark.slow
def test_onnx_in_8_bits_is_lossless_too():
    shown = finish(Choice(FREE, backend="onnx", precision="w8"), ask())
    assert [one.token for one in shown.method.kept] == [one.token for one in shown.full.kept]
    assert shown.different_words == 0


def test_an_exit_adapter_is_used(tmp_path):
    loaded = load_model(LLAMA)
    adapter = make_exit_adapter(view_for(loaded.model), "layer", 3)
    attach_exit_adapter(loaded.model, adapter)
    save_exit_adapter(loaded.model, tmp_path)
    choice = Choice(LLAMA, str(tmp_path))
    assert SESSION.open(choice).shallow_layer == 3
    shown = finish(choice, ask(shallow_layer=3))
    assert 3 in {token.layer for token in shown.method.tokens}
    assert [one.token for one in shown.method.kept] == [one.token for one in shown.full.kept]
    with pytest.raises(UserError, match="the exit adapter stands after 3"):
        finish(choice, ask(shallow_layer=2))


def test_models_with_a_chat_template_are_asked_through_it(tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(LLAMA, folder)
    tokenizer = load_model(LLAMA).tokenizer
    tokenizer.chat_template = "{% for message in messages %}Q: {{ message.content }}\nA:{% endfor %}"
    tokenizer.save_pretrained(folder)
    opened = SESSION.open(Choice(str(folder)))
    asked = tokenizer(f"Q: {BUS}\nA:", add_special_tokens=False).input_ids
    assert encode(opened, ask())["input_ids"].tolist() == [asked]


# Two requests at once


def summary(shown):
    return [(one.token, one.layer, one.state, one.confidence) for one in shown.method.tokens], shown.full.text


@pytest.mark.parametrize(
    "choice",
    [Choice(FREE), pytest.param(Choice(FREE, backend="onnx", precision="w8"), marks=pytest.mark.slow)],
    ids=["torch", "onnx"],
)
def test_requests_at_once_give_what_each_gives_alone(choice):
    """On one model, with other texts, methods and thresholds, so that anything shared would show."""
    texts = examples_for(FREE, encoder=True, chat=False)
    requests = [
        ask(m, t, threshold=0.1 + 0.1 * n) for n, (m, t) in enumerate(zip(POLICIES, texts, strict=False))
    ]
    alone = [summary(finish(choice, request)) for request in requests]
    found, barrier = {}, threading.Barrier(len(requests))

    def answer(number):
        barrier.wait()
        found[number] = summary(finish(choice, requests[number]))

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(number) for number in range(len(requests))] == alone
    assert len({text for _, text in alone}) == len(requests)


def test_who_leaves_early_ends_the_decoding():
    before, loaded = threading.active_count(), SESSION.open(Choice(FREE))
    steps = compare(loaded, ask(), Limits())
    next(steps)
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before


def test_errors_of_the_decoding_thread_reach_who_waits(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(comparison, "trace_layers", fail)
    monkeypatch.setattr(comparison, "decode", fail)
    with pytest.raises(ZeroDivisionError):
        finish(Choice(FREE), ask())


@pytest.mark.slow
def test_models_are_loaded_once_and_the_least_recent_goes(monkeypatch):
    from util.demo import session

    loads = []
    real = session.load_model
    monkeypatch.setattr(session, "load_model", lambda name, **more: loads.append(name) or real(name, **more))
    kept = Session(models_kept=2)
    threads = [threading.Thread(target=kept.open, args=(Choice(FREE),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == [FREE]
    first = kept.open(Choice(FREE))
    kept.open(Choice(CALM))
    assert kept.open(Choice(FREE)) is first
    kept.open(Choice(LLAMA))
    assert kept.open(Choice(FREE)) is first and loads == [FREE, CALM, LLAMA]
    kept.open(Choice(CALM))
    assert loads == [FREE, CALM, LLAMA, CALM]


def test_a_model_that_is_loaded_does_not_wait_for_another(monkeypatch):
    """A hub that does not answer holds up nobody else."""
    from util.demo import session

    kept, asked, answer = Session(), threading.Event(), threading.Event()
    first = kept.open(Choice(FREE))

    def load_slowly(name, exit_adapter):
        asked.set()
        answer.wait(60)
        raise UserError(name)

    monkeypatch.setattr(session, "load_model", load_slowly)

    def open_it():
        with pytest.raises(UserError):
            kept.open(Choice("far/away"))

    thread = threading.Thread(target=open_it)
    thread.start()
    assert asked.wait(60) and kept.open(Choice(FREE)) is first
    answer.set()
    thread.join()


def test_slow_motion_shows_every_event_and_quick_the_last(monkeypatch):
    pauses = []
    monkeypatch.setattr(comparison.time, "sleep", pauses.append)
    assert [*paced(iter(range(5)), 0.2)] == [0, 1, 2, 3, 4, 4] and pauses == [0.2] * 5
    monkeypatch.setattr(comparison.time, "monotonic", lambda: 7.0)
    assert [*paced(iter(range(5)), 0)] == [0, 4] and [*paced(iter(()), 0)] == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"text": " \n"}, "Text: type one"),
        ({"text": "a" * 2001}, "Text: 2001 characters; at most 2000"),
        ({"text": "ä ö " * 495}, r"Text: \d+ tokens; at most 1024 are taken"),
        ({"method": "beam"}, "Method: 'beam' is none of Full depth, Static"),
        ({"threshold": 1.1}, r"Threshold: must lie in \[0, 1\], got 1.1"),
        ({"threshold": float("nan")}, "Threshold: must lie"),
        ({"shallow_layer": 8}, r"Shallow layer: must be a whole number in 1\.\.7, got 8"),
        ({"shallow_layer": 2.5}, "Shallow layer: must be a whole number"),
        ({"max_pending": -1}, "Most tokens that wait: must be"),
        ({"max_new_tokens": 257}, r"New tokens: must be a whole number in 2\.\.256, got 257"),
    ],
)
def test_requests_out_of_bounds_get_one_line(changes, line):
    with pytest.raises(UserError, match=line) as refusal:
        finish(Choice(FREE), ask(**changes))
    assert "\n" not in str(refusal.value)


def test_a_prompt_leaves_room_for_its_answer():
    positions = json.loads(Path(LLAMA, "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(UserError, match=f"at most {positions - 56} are taken"):
        finish(Choice(LLAMA), ask(text="Paket " * positions, max_new_tokens=56))


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (Choice(""), "Checkpoint: choose one"),
        (Choice(str(ROOT / "checkpoints/none")), "There is no checkpoint"),
        (Choice(str(ROOT / "docs")), "Cannot load a model from"),
        (Choice(FREE, exit_adapter=CALM), "has no exit_adapter_config.json"),
        (Choice(FREE, backend="compile"), "Backend: 'compile' is none of torch, onnx"),
        (Choice(FREE, precision="w8"), "precision w8 needs backend onnx"),
    ],
)
def test_models_that_cannot_be_opened_get_one_line(choice, line):
    with pytest.raises(UserError, match=line) as refusal:
        SESSION.open(choice)
    assert "\n" not in str(refusal.value)


def test_only_what_is_offered_is_opened_for_others():
    closed = Session(offered=(FREE,))
    assert closed.open(Choice(FREE)).num_layers == 8
    for choice in (Choice(LLAMA), Choice(FREE, exit_adapter=LLAMA)):
        with pytest.raises(UserError, match="this page takes no others"):
            closed.open(choice)


@pytest.mark.parametrize(
    ("flags", "any_checkpoint"),
    [({}, True), ({"host": "0.0.0.0"}, False), ({"host": "0.0.0.0", "any_checkpoint": True}, True)],
)
def test_the_network_may_not_name_checkpoints_unless_it_is_let(flags, any_checkpoint):
    assert DemoArguments(**flags).takes_any_checkpoint is any_checkpoint


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"port": 0}, "--port must lie"),
        ({"max_new_tokens": 1}, "at least 2"),
        ({"threads": 0}, "--threads must"),
    ],
)
def test_flags_are_checked(flags, line):
    with pytest.raises(UserError, match=line):
        DemoArguments(**flags)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "util.demo.page", raising=False)
    with pytest.raises(SystemExit) as stop:
        demo.main([])
    assert stop.value.code == 2
    line = "error: The page needs Gradio: pip install -r requirements-demo.txt\n"
    assert capsys.readouterr().err == line


# What there is to choose


def test_examples_are_rows_of_the_test_split():
    with gzip.open(ROOT / "data/debian/debian_de_en/test.jsonl.gz", "rt", encoding="utf8") as file:
        german = {json.loads(line)["translation"]["de"] for line in file}
    texts = examples_for(FREE, encoder=True, chat=False)
    assert len({*texts}) == 6 and {*texts} <= german
    assert not german & {*examples_for("user/chat", encoder=False, chat=True)}


def test_embedded_checkpoints_are_all_offered():
    folders = {path.parent for path in ROOT.glob("checkpoints/*/model.safetensors")}
    assert {*map(Path, embedded_checkpoints())} == folders and embedded_checkpoints()[0] == FREE
