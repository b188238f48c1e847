"""Tasks for decoder-only models: prompts, shots, chat templates, lengths, records without the prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny_causal import tiny_causal
from transformers import AutoTokenizer

import run
from models.errors import UserError
from models.loading import load_model
from models.prompts import Prompt
from util.data.encoding import PromptEncoder, encoder_for
from util.data.examples import dataset_record, load_examples, tokenize
from util.data.preparation import prepare
from util.data_arguments import DataArguments
from util.evaluation.comparison import LiveSetting, trace_output
from util.evaluation.decode import decode_batch, describe_batch
from util.evaluation.records import EvaluationSettings
from util.methods import BASELINE

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with the embedded vocabulary, whose tokenizer ends texts with </s> by itself."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/debian-t5-free")
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    tiny_causal("llama-tied", num_layers=4, **settings).save_pretrained(path)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def loaded(folder):
    return load_model(folder)


def arguments(**flags):
    lengths = {"max_source_length": 60, "max_target_length": 12}
    return DataArguments(**{"task": "translation", "dataset_name": "debian_de_en", **lengths, **flags})


def asked(loaded, source, **flags):
    """The prompt of a source, decoded from its ids."""
    prepare(loaded, arguments(**flags))
    token_ids = encoder_for(loaded, 60).inputs([source])["input_ids"][0]
    return loaded.tokenizer.decode(token_ids)


def test_each_task_has_a_plain_prompt(loaded):
    assert asked(loaded, "Eine Bibliothek") == "Eine Bibliothek Translation:"
    flags = {"task": "summarization", "dataset_name": "debian_synopsis"}
    assert asked(loaded, "A library.", **flags) == "A library. Summary:"  # blanks are one to this tokenizer


def test_templates_name_source_and_languages(loaded):
    template = r"{source_lang} to {target_lang}:\n{source}\n"
    prepare(loaded, arguments(prompt_template=template))
    assert loaded.prompt == Prompt("de to en:\n{source}\n")
    assert loaded.prompt.ask(loaded.tokenizer, "{target_lang}") == "de to en:\n{target_lang}\n"
    with pytest.raises(UserError, match=r"^--prompt_template needs a place for the source: \{source\}\.$"):
        prepare(loaded, arguments(prompt_template="Translate!"))


def test_chat_templates_are_the_tokenizers(loaded):
    prepare(loaded, arguments(use_chat_template=True, prompt_template="Say {source} in English"))
    messages = [{"role": "user", "content": "Say Daten in English"}]
    expected = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert loaded.prompt.ask(loaded.tokenizer, "Daten") == expected
    assert expected == "<|user|>Say Daten in English</s><|assistant|>"
    loaded.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^--use_chat_template True: the tokenizer has no chat template"):
        prepare(loaded, arguments(use_chat_template=True))


@pytest.mark.slow
def test_shots_come_from_train_and_a_seed_chooses_them(loaded):
    with gzip.open(ROOT / "data/debian/debian_de_en/train.jsonl.gz", "rt") as file:
        train = {tuple(json.loads(line)["translation"].values()) for line in file}
    drawn = []
    for seed in (0, 0, 1):
        prepare(loaded, arguments(num_shots=2, shot_seed=seed, max_source_length=120))
        drawn.append(loaded.prompt.shots)
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0] + drawn[2]) <= train
    (first, answer), (second, other) = drawn[2]
    text = loaded.prompt.ask(loaded.tokenizer, "Daten")
    assert text == (
        f"{first}\n\nTranslation: {answer}\n\n{second}\n\nTranslation: {other}\n\nDaten\n\nTranslation:"
    )
    chat = Prompt("{source}", chat=True, shots=(("a", "b"),))
    assert chat.ask(loaded.tokenizer, "c") == "<|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>"
    with pytest.raises(UserError, match=r"^--num_shots 5: only"):
        prepare(loaded, arguments(num_shots=5, max_source_length=30))


def test_training_rows_are_prompt_and_answer(loaded):
    prepare(loaded, arguments())
    encoder = encoder_for(loaded, 60, 12)
    row = encoder({"source": ["Eine Bibliothek"], "target": ["A library"]})
    ids, labels = row["input_ids"][0], row["labels"][0]
    answer = [label for label in labels if label != -100]
    assert loaded.tokenizer.decode(ids) == "Eine Bibliothek Translation: A library</s>"
    assert loaded.tokenizer.decode(answer) == "A library</s>"
    assert labels == [-100] * (len(ids) - len(answer)) + ids[-len(answer) :]
    prompt = encoder.inputs(["Eine Bibliothek"])["input_ids"][0].tolist()
    assert ids[: len(prompt)] == prompt and len(prompt) + len(answer) == len(ids)


def test_cut_sources_keep_their_question_and_cut_targets_their_end(loaded, caplog):
    prepare(loaded, arguments())
    encoder = PromptEncoder(loaded.tokenizer, loaded.prompt, 12, 4)
    long = "Eine Bibliothek für Programme und Daten in vielen Paketen des Systems"
    row = encoder({"source": [long], "target": ["A library for programs and data"]})
    answer = [label for label in row["labels"][0] if label != -100]
    prompt = loaded.tokenizer.decode(row["input_ids"][0][: -len(answer)])
    assert prompt.startswith("Eine Bibliothek") and prompt.endswith(" Translation:") and long not in prompt
    assert len(row["input_ids"][0]) - len(answer) <= 12
    assert len(answer) == 4 and answer[-1] == loaded.tokenizer.eos_token_id
    with pytest.raises(UserError, match=r"^--max_source_length 3 leaves no room for a source in its prompt"):
        PromptEncoder(loaded.tokenizer, loaded.prompt, 3)({"source": [long], "target": ["A"]})
    data = arguments(max_source_length=12, max_train_samples=30)
    examples = load_examples(dataset_record(data), data, "train", loaded.tokenizer, 30, loaded.prompt)
    tokenize(examples, loaded.tokenizer, data, 4, loaded.prompt)
    assert (
        "sources are cut to --max_source_length 12" in caplog.text and "targets are cut to 4" in caplog.text
    )


@pytest.mark.slow
def test_long_rows_are_dropped_by_prompt_and_answer(loaded):
    prepare(loaded, arguments())
    data = arguments(drop_long_samples=True, max_source_length=20)
    examples = load_examples(dataset_record(data), data, "test", loaded.tokenizer, 40, loaded.prompt)
    for row in tokenize(examples, loaded.tokenizer, data, 12, loaded.prompt):
        answer = sum(label != -100 for label in row["labels"])
        assert len(row["labels"]) - answer <= 20 and answer <= 12


def test_windows_of_questions_fit_with_their_prompt(loaded):
    data = arguments(
        task="question_answering", dataset_name=None, data_dir=str(ROOT / "data/questions"), doc_stride=8
    )
    prepare(loaded, data)
    examples = load_examples(dataset_record(data), data, "validation", loaded.tokenizer, 3, loaded.prompt)
    lengths = [len(ids) for ids in encoder_for(loaded).whole_sources(list(examples["source"]))]
    assert max(examples["window"]) > 0 and max(lengths) <= 60


def test_prompts_flags_are_refused_for_models_with_an_encoder():
    t5 = load_model(str(ROOT / "checkpoints/debian-t5-free"))
    with pytest.raises(UserError, match=r"^--use_chat_template and --num_shots: prompts are for"):
        prepare(t5, arguments(use_chat_template=True, num_shots=2))
    prepare(t5, arguments())
    assert t5.prompt is None


def test_outputs_equal_generates_and_hold_no_prompt(loaded):
    """Rows of different lengths, padded on the left; the flag counts new tokens alone."""
    data = arguments()
    prepare(loaded, data)
    examples = load_examples(dataset_record(data), data, "test", loaded.tokenizer, 4, loaded.prompt)
    settings = EvaluationSettings("translation", 200, 9, Path("unused"))
    records = describe_batch(loaded, examples, decode_batch(loaded, None, examples, settings))
    for row, record in zip(examples, records, strict=True):
        text = f"{row['source']}\n\nTranslation:"
        prompt = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, :-1]  # without </s>
        output = loaded.model.generate(prompt, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :]
        assert record.prediction == loaded.tokenizer.decode(output, skip_special_tokens=True).lstrip()
        assert record.tokens == len(output) <= 9 and record.source == row["source"]


def test_traces_follow_the_prompt(loaded):
    """The last layer's predictions along an output are the output."""
    data = arguments()
    prepare(loaded, data)
    examples = load_examples(dataset_record(data), data, "test", loaded.tokenizer, 1, loaded.prompt)
    settings = EvaluationSettings("translation", 200, 9, Path("unused"))
    setting = LiveSetting(BASELINE, BASELINE, "", loaded=loaded, policy=None)
    (record,) = describe_batch(loaded, examples, decode_batch(loaded, None, examples, settings))
    record.row = 0
    trace = trace_output(setting, record, examples[0]["source"], settings)
    assert trace.deep == record.pieces and trace.confidences.shape == (record.tokens, 4)


def test_the_end_token_of_answers_stops_outputs(loaded):
    loaded.model.generation_config.eos_token_id = 7
    prepare(loaded, arguments())
    assert loaded.model.generation_config.eos_token_id == [7, loaded.tokenizer.eos_token_id]


@pytest.mark.slow
def test_shots_and_batches_by_flags(folder, tmp_path):
    flags = {
        "model_name_or_path": folder, "task": "translation", "dataset_name": "debian_de_en", "do_eval": True,
        "max_eval_samples": 3, "max_source_length": 150, "val_max_target_length": 8, "num_shots": 2,
        "use_shallow_deep": True, "shallow_exit_layer": 2, "shallow2deep_conf_threshold": 0.01,
        "use_cpu": True, "report_to": "none", "backend": "torch",
    }  # fmt: skip
    texts = []
    for size in (1, 3):
        own = flags | {"per_device_eval_batch_size": size, "output_dir": tmp_path / str(size)}
        run.main([word for name, value in own.items() for word in (f"--{name}", str(value))])
        lines = (tmp_path / str(size) / "predictions.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["prediction"] for line in lines])
        results = json.loads((tmp_path / str(size) / "eval_results.json").read_text())
        assert results["arguments"]["num_shots"] == 2
    assert texts[0] == texts[1] and not any("Translation:" in text for text in texts[0])
