"""The prompts that the released exit is taught on."""

from __future__ import annotations

import json

import pytest

from scripts import make_exit_prompts

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


def test_no_prompt_is_taught_twice_or_held_out_and_taught(folder):
    same = [{"dialogue": "Mia: row 4", "summary": "-"}] * 3 + [{"dialogue": "Mia: once", "summary": "-"}] * 2
    (folder / "samsum.train.json").write_text("\n".join(map(json.dumps, same)))
    flags = ["--data_dir", str(folder), "--output_file", str(folder / "prompts.jsonl"), "--others", "4"]
    make_exit_prompts.main([*flags, "--held_out", "2", "--held_out_from", "4"])
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["source"] for line in lines]
    assert prompts[-2].endswith("Mia: row 4") and len(set(prompts)) == len(prompts)
    assert sum(prompt.endswith("Mia: once") for prompt in prompts) == 1
