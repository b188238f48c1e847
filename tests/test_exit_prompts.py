"""The prompts that the released exit is taught on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_causal import tiny_causal
from transformers import AutoTokenizer

from models import UserError
from scripts import make_exit_prompts
from util.exit_training.instructions import write_instructions
from util.files import locked

CHAT = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>{% endfor %}"

TURNS = [f"{name}: I say {number}." for number, name in enumerate(["Mia", "Tom"] * 10)]
DIALOGUES = ["\r\n".join(TURNS), "Mia: short\nTom: indeed", ""]


@pytest.fixture
def folder(tmp_path):
    def write(name, rows):
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))

    write("samsum.train", [{"dialogue": text, "summary": "-"} for text in DIALOGUES])
    write("samsum.validation", [{"dialogue": f"Mia: row {row}", "summary": "-"} for row in range(9)])
    german = [{"translation": {"de": f"Das ist der Satz {row}, er hat mehr als vierzig Zeichen.", "en": "-"}}
              for row in range(8)]  # fmt: skip
    write("iwslt2017.train", german)
    contexts = ["word " * 200, *(f"word{row} " * 200 for row in range(7))]
    squad = [{"question": f"Who is {row}?", "context": context} for row, context in enumerate(contexts)]
    write("squad.train", squad)
    return tmp_path


def test_parts_are_runs_of_turns_and_held_out_rows_stand_last(folder):
    flags = ["--data_dir", str(folder), "--output_file", str(folder / "prompts.jsonl"), "--parts", "5"]
    make_exit_prompts.main([*flags, "--others", "8", "--held_out", "3", "--held_out_from", "4"])
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["source"] for line in lines]
    task = "Summarize the following text.\n\n"
    assert prompts[-3:] == [f"{task}Mia: row {row}" for row in (4, 5, 6)]
    dialogues = [prompt.removeprefix(task) for prompt in prompts[:-3] if prompt.startswith(task)]
    assert {"\n".join(TURNS), DIALOGUES[1]} <= set(dialogues)
    parts = set(dialogues) - {"\n".join(TURNS), DIALOGUES[1]}
    assert len(dialogues) == 7 and all(part in "\n".join(TURNS) for part in parts)
    assert all(4 <= part.count("\n") + 1 <= 14 for part in parts)
    translations = [prompt for prompt in prompts if prompt.startswith("Translate from German to English.")]
    assert len(translations) == 4 and "Who is" in str(prompts) and "Name three ways to cook pasta." in prompts
    assert len(prompts) == 7 + 4 + 2 + 2 + 150 + 3 and len(set(prompts)) == len(prompts)


def test_fewer_dialogues_than_are_to_be_held_out_are_refused(folder, capsys):
    flags = ["--data_dir", str(folder), "--output_file", str(folder / "prompts.jsonl"), "--others", "4"]
    with pytest.raises(SystemExit):
        make_exit_prompts.main([*flags, "--held_out", "6", "--held_out_from", "4"])
    assert "--held_out 6: the validation split has 5 dialogues after" in capsys.readouterr().err
    assert not (folder / "prompts.jsonl").exists()


def refusal(folder, capsys, *flags):
    """The one line that the script answers with, whatever was there staying as it was."""
    before = sorted(folder.iterdir())
    own = ["--data_dir", str(folder), "--held_out", "2", "--held_out_from", "4", "--others", "4"]
    with pytest.raises(SystemExit):
        make_exit_prompts.main([*own, "--output_file", str(folder / "prompts.jsonl"), *flags])
    assert sorted(folder.iterdir()) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize(("name", "missing"), [
    ("samsum.train", "dialogue"), ("samsum.validation", "dialogue"), ("iwslt2017.train", "translation"),
    ("squad.train", "question")])  # fmt: skip
def test_rows_of_other_columns_are_refused(folder, capsys, name, missing):
    (folder / f"{name}.json").write_text('{"german": "Ein Satz", "english": "A sentence"}\n' * 9)
    complaint = f"error: {folder / name}.json: no column '{missing}'; found german, english."
    assert refusal(folder, capsys) == complaint


def test_sentences_without_german_are_refused(folder, capsys):
    (folder / "iwslt2017.train.json").write_text('{"translation": {"fr": "Une phrase"}}\n')
    assert "a 'translation' must hold its German text under 'de'" in refusal(folder, capsys)


def test_one_file_serves_no_three_data_sets(folder, capsys):
    (folder / "iwslt2017.train.json").rename(folder / "train.json")
    complaint = "train.json may be any data set's; name that of iwslt2017 iwslt2017.train.json."
    assert refusal(folder, capsys) == f"error: --data_dir {folder}: {complaint}"


def test_nothing_is_drawn_for_a_file_that_another_run_writes(folder, capsys, monkeypatch):
    monkeypatch.setattr(make_exit_prompts, "draw_prompts", lambda flags: pytest.fail("drawn"))
    (folder / "taken").mkdir()
    with locked(folder / "taken" / ".out.lock", ""):
        line = refusal(folder, capsys, "--output_file", str(folder / "taken" / "out"))
    assert "another run is writing it" in line


def test_no_prompt_is_taught_twice_or_held_out_and_taught(folder):
    same = [{"dialogue": "Mia: row 4", "summary": "-"}] * 3 + [{"dialogue": "Mia: once", "summary": "-"}] * 2
    (folder / "samsum.train.json").write_text("\n".join(map(json.dumps, same)))
    flags = ["--data_dir", str(folder), "--output_file", str(folder / "prompts.jsonl"), "--others", "4"]
    make_exit_prompts.main([*flags, "--held_out", "2", "--held_out_from", "4"])
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["source"] for line in lines]
    assert prompts[-2].endswith("Mia: row 4") and len(set(prompts)) == len(prompts)
    assert sum(prompt.endswith("Mia: once") for prompt in prompts) == 1


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/debian-t5-free")
    tokenizer.chat_template = CHAT
    return tokenizer


def test_instructions_go_on_where_a_user_begins_and_come_to_an_end(tokenizer):
    end = tokenizer.eos_token_id
    said = ["Name the packages of it.", "Short.", "Name the packages of it.", "Here is a package manager."]
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, end, 5, 5] for text in said]
    rows.append(tokenizer("This one never comes to its end", add_special_tokens=False).input_ids)
    longest, asked = max(map(len, rows)), []

    def generate(input_ids, attention_mask, **options):
        asked.extend(tokenizer.batch_decode(input_ids))
        padded = [[*row, *[7] * (longest - len(row))] for row in rows[: len(input_ids)]]
        return torch.cat([input_ids, torch.tensor(padded)], 1)

    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=end), device=torch.device("cpu"))
    loaded = SimpleNamespace(tokenizer=tokenizer, model=model, generate=generate)
    found = write_instructions(loaded, len(rows) + 2, batch_size=len(rows), seed=0)
    assert found == ["Name the packages of it.", "Here is a package manager."]
    assert asked == [tokenizer.decode(tokenizer("<user> ", add_special_tokens=False).input_ids)] * 7


def test_a_chat_template_must_show_what_users_say(tokenizer):
    for template, complaint in ((None, "has no chat template"), ("Hello", "leaves out what a user says")):
        other = SimpleNamespace(chat_template=template, apply_chat_template=lambda *given, **options: "Hello")
        with pytest.raises(UserError, match=complaint):
            write_instructions(SimpleNamespace(tokenizer=other), 1, batch_size=1, seed=0)


@pytest.mark.slow
def test_the_model_writes_instructions_itself(folder, tokenizer, capsys):
    model = tiny_causal(vocab_size=len(tokenizer), max_position_embeddings=128)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, len(tokenizer), 8)]  # ends soon
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    flags = ["--data_dir", str(folder), "--others", "4", "--held_out", "3", "--held_out_from", "4"]
    written = []
    for name in ("without", "with", "again"):
        more = ["--self_instructed", "12", "--model_name_or_path", str(folder / "model")]
        more += ["--generation_batch_size", "8"]
        file = folder / f"{name}.jsonl"
        make_exit_prompts.main([*flags, "--output_file", str(file), *(more if name != "without" else [])])
        written.append([json.loads(line)["source"] for line in file.read_text().splitlines()])
    without, first, again = written
    assert first == again and {*without} < {*first} and 4 <= len(first) - len(without) <= 12
    with pytest.raises(SystemExit):
        make_exit_prompts.main([*flags, "--self_instructed", "12"])
    assert "--self_instructed and --model_name_or_path need each other" in capsys.readouterr().err
