"""Outputs after a prompt with examples end where the next example would begin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_causal import tiny_causal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import run
from models import Free, FullDepth, SoftmaxGap, load_model
from models.prompts import Prompt
from util.data.encoding import PromptEncoder
from util.evaluation.decode import decode_batch, describe_batch
from util.evaluation.records import EvaluationSettings

TOKENS, LAYERS, BREAK = 24, 4, "\n\n"
SHOTS = (("ein Paket", "a package."), ("die Daten", "the data."))
SOURCES = ["Werkzeug", "eine Bibliothek für Programme", "Spiel", "Netz"]
POLICIES = {
    "Hugging Face's loop": None,
    "full": FullDepth(),
    "lossless": Free(2, SoftmaxGap(), -1.0, lossless=True),
}


def byte_level_tokenizer():
    """Bytes as GPT-2 spells them, with merges: two line breaks, a full stop with them, two letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "</s>", *alphabet, "ĊĊ", ".ĊĊ", "th"]
    merges = [("Ċ", "Ċ"), (".", "ĊĊ"), ("t", "h")]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama that likes to break lines."""
    path, tokenizer = tmp_path_factory.mktemp("llama"), byte_level_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = tiny_causal("llama-untied", num_layers=LAYERS, **sizes)
    for name in ("ĊĊ", ".ĊĊ"):
        model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(name)] *= 1.6
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def loaded(folder):
    loaded = load_model(folder)
    loaded.prompt = Prompt("{source} =", shots=SHOTS)
    return loaded


def whole_output(loaded, source):
    """Ids that Hugging Face decodes without a stop."""
    shown = [f"{german} = {english}" for german, english in SHOTS]
    inputs = loaded.tokenizer(BREAK.join([*shown, f"{source} ="]), return_tensors="pt")
    output = loaded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def expected_length(loaded, output):
    """Tokens up to the first after which the text holds an empty line."""
    texts = [loaded.tokenizer.decode(output[: length + 1]) for length in range(len(output))]
    return next((index + 1 for index, text in enumerate(texts) if BREAK in text), len(output))


def decode(loaded, policy, sources):
    rows = [{"id": str(index), "source": text, "target": "x"} for index, text in enumerate(sources)]
    examples, settings = Dataset.from_list(rows), EvaluationSettings("translation", 400, TOKENS, Path("x"))
    return describe_batch(loaded, examples, decode_batch(loaded, policy, examples, settings))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, len(SOURCES)])
@pytest.mark.parametrize("name", POLICIES)
def test_outputs_end_before_the_next_example(loaded, name, batch):
    lengths = []
    for first in range(0, len(SOURCES), batch):
        sources = SOURCES[first : first + batch]
        records = decode(loaded, POLICIES[name], sources)
        for source, record in zip(sources, records, strict=True):
            output = whole_output(loaded, source)
            text = loaded.tokenizer.decode(output, skip_special_tokens=True)
            assert record.prediction == text.partition(BREAK)[0].lstrip()
            lengths.append(expected_length(loaded, output))
            assert record.tokens == lengths[-1]
            assert record.exit_layers is None or len(record.exit_layers) == record.tokens
        steps = max(lengths[first:])
        if POLICIES[name] is not None:
            assert records[0].full_layer_calls * len(sources) == LAYERS * steps, "the loop stops early"
    assert min(lengths) < max(lengths) and min(lengths) < TOKENS, "rows end at different lengths"


def test_a_chat_and_a_prompt_without_shots_have_no_stop(loaded):
    for prompt in (Prompt("{source} ="), Prompt("{source} =", chat=True, shots=SHOTS)):
        assert prompt.stop is None and prompt.answer_length("a\n\nb") is None
        encoder = PromptEncoder(loaded.tokenizer, prompt)
        assert encoder.output_limit(5) == {"max_new_tokens": 5}
        token_ids = loaded.tokenizer("a\n\nb")["input_ids"]
        assert encoder.ended(token_ids) == token_ids
    assert Prompt(shots=(("a", "one\n\ntwo"),)).stop is None, "it would cut such answers"


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        ("{source} =", "a\n\nb = c", "a"),
        ("{source} =", "a\nb", None),
        ("{source}\n", "\nb", ""),  # the second of two breaks
        ("{source}\n", "a\n\nb", "a"),
        ("{source}\n\nSummary:", "a", None),  # whose own breaks are none of the answer's
    ],
)
def test_where_an_answer_ends(template, text, answer):
    length = Prompt(template, shots=SHOTS).answer_length(text)
    assert length == (None if answer is None else len(answer))


def evaluate(folder, output, caplog, rows):
    for split in ("train", "validation"):
        lines = [json.dumps({"source": source, "target": target}) for source, target in rows]
        (output / f"{split}.jsonl").write_text("\n".join(lines))
    flags = {
        "model_name_or_path": folder, "task": "translation", "train_file": output / "train.jsonl",
        "validation_file": output / "validation.jsonl", "source_column": "source", "target_column": "target",
        "prompt_template": "{source} =", "num_shots": 2, "max_source_length": 200,
        "val_max_target_length": TOKENS, "do_eval": True, "use_cpu": True, "report_to": "none",
        "backend": "torch", "output_dir": output / "out",
    }  # fmt: skip
    caplog.clear()
    run.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    return (output / "out/predictions.jsonl").read_text(), caplog.text


def test_run_stops_or_says_why_not(folder, tmp_path, caplog):
    rows = [*SHOTS, ("ein Netz", "a net."), ("ein Spiel", "a game.")]
    (tmp_path / "plain").mkdir()
    predictions, log = evaluate(folder, tmp_path / "plain", caplog, rows)
    texts = [json.loads(line)["prediction"] for line in predictions.splitlines()]
    assert len(texts) == 4 and not any(BREAK in text for text in texts) and "--num_shots" not in log
    (tmp_path / "long").mkdir()
    _, log = evaluate(folder, tmp_path / "long", caplog, [(a, f"{b}\n\nMore.") for a, b in rows])
    assert "not at the empty line between examples, as an example's answer holds one itself" in log


def test_a_token_over_the_border_adds_no_second_blank():
    tokenizer, answer = byte_level_tokenizer(), "\nth"
    for template, expected in (("{source}\n", ["Ċ", "th"]), ("{source} =", ["Ġ", "Ċ", "th"])):
        prompt = Prompt(template)
        asked = [prompt.ask(tokenizer, "x")]
        expected_ids = tokenizer.convert_tokens_to_ids([*expected, "</s>"])
        assert prompt.encode_answers(tokenizer, asked, [answer]) == [expected_ids], template
