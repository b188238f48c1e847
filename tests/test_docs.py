"""Every Python block of the documentation runs, in order, page by page; commands where a page is a path."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from models import families

ROOT = Path(__file__).parent.parent
OWN_DATA = ROOT / "docs/your_own_data.md"  # writes files
INDEX = ROOT / "docs/README.md"
PAGES = [*sorted({*ROOT.glob("docs/*.md")} - {OWN_DATA, INDEX}), ROOT / "README.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(families, "VIEWS", dict(families.VIEWS))
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf8"), re.DOTALL | re.MULTILINE)
    assert blocks, f"{page.name} has no Python example"
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)


SHORT = ["--val_max_target_length", "8"]
OVERRIDES = {  # fewer of everything; what a page's command does stays the same
    "train_tokenizer": ["--vocab_size", "600"],
    "run": [
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--max_predict_samples",
        "2",
        "--use_cpu",
    ],
    "sweep": ["--num_samples", "2", *SHORT],
    "learn_shortlist": ["--num_samples", "2", *SHORT],
    "report": [],
}


@pytest.mark.slow
def test_your_own_data_from_a_csv_to_a_report(tmp_path, monkeypatch, capsys):
    """Every command of the page, in order, from its rows to its report; each says what comes next."""
    text = OWN_DATA.read_text(encoding="utf8")
    (rows,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    exec(compile(rows.replace("4000", "300").replace("100", "3"), "rows", "exec"), {})
    for command in blocks:
        python, script, *flags = shlex.split(command.replace("\\\n", " "))
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        assert python == "python"
        module.main([*flags, *OVERRIDES[module.__name__.split(".")[-1]]])
        assert "Next: " in " ".join(capsys.readouterr().out.split())
    for name in ("tokenizer/spiece.model", "model/exit_config.json", "shortlist.json", "report/report.html"):
        assert Path("save/own", name).is_file()
    outputs = Path("save/own/free/predictions_test.jsonl").read_text(encoding="utf8")
    assert len(outputs.splitlines()) == 2
    log = json.loads(Path("save/own/model/trainer_state.json").read_text(encoding="utf8"))
    assert log["logging_steps"] == 10


def test_the_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    modules = {path.name for part in ("models", "util") for path in ROOT.glob(f"{part}/*.py")}
    unnamed = {name for name in modules - {"__init__.py"} if name not in text}
    assert all(name.endswith("_arguments.py") for name in unnamed), unnamed


def test_the_index_names_every_page():
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {INDEX.name}
    linked = set(re.findall(r"\]\(([^)]+\.md)\)", INDEX.read_text(encoding="utf8")))
    assert linked == pages
