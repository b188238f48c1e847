"""The report on folders that the programs themselves wrote, here also where nothing heavy is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_folders import Page, build, read_csv

import run
from gpt_eval.__main__ import main as judge
from gpt_eval.stand_in_server import StandInServer
from models.errors import UserError
from scripts import calibrate, choose_exit, sweep, train_exit, train_tokenizer
from util.report.folders import read_folders

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = str(ROOT / "checkpoints/debian-t5-free")
DATA = {"dataset_name": "debian_de_en", "max_source_length": 28, "val_max_target_length": 28}
FREE = {"use_shallow_deep": True, "shallow_exit_layer": 2}
FAST = ["--requests_per_minute", "600000", "--tokens_per_minute", "1000000000", "--backoff", "0.02"]
SAMPLES = 3


def as_argv(flags):
    words = {name: value if isinstance(value, list) else [value] for name, value in flags.items()}
    return [word for name, values in words.items() for word in (f"--{name}", *map(str, values))]


def run_judge(folder, predictions):
    """Requests, answers and scores of a model that is played by a server here."""
    files = ["--requests", str(folder / "requests.jsonl"), "--answers", str(folder / "answers.jsonl")]
    systems = ["--predictions", *(f"{name}={path}" for name, path in predictions.items())]
    assert judge(["make", *files[:2], *systems, "--dataset_name", "debian_de_en"]) == 0
    with StandInServer() as server:
        assert judge(["run", *files, "--model", "m", "--base_url", server.base_url, *FAST]) == 0
    assert judge(["score", *files, "--output_dir", str(folder)]) == 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of a sweep, of two runs, of a calibration and of a judge, all on the same samples."""
    folder = tmp_path_factory.mktemp("results")
    sizes = {"free_thresholds": [0.2, 0.4], "batch_sizes": [1, 2], "adapt_zetas": 0.8, "threads": 1}
    methods = {"methods": ["HF generate", "Static", "FREE", "FREE adaptive"], "static_layers": 2}
    given = {"free": CHECKPOINT, "num_samples": SAMPLES, "output_dir": folder / "sweep"}
    sweep.main(as_argv(given | sizes | methods | DATA))
    common = {"model_name_or_path": CHECKPOINT, "task": "translation", "use_cpu": True, "report_to": "none"}
    common |= {"max_predict_samples": SAMPLES, "per_device_eval_batch_size": 1, **DATA}
    for name, method in {"full": {}, "early": FREE | {"shallow2deep_conf_threshold": 0.4}}.items():
        run.main(as_argv(common | method | {"do_predict": True, "output_dir": folder / name}))
    grid = {"thresholds": [0.4], "delta": 0.5, "epsilon": 0.2, "split": "test"}
    calibrate.main(as_argv(common | FREE | grid | {"output_dir": folder / "calibration"}))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", "sk-none")
        predictions = {name: folder / name / "predictions_test.jsonl" for name in ("early", "full")}
        run_judge(folder / "judge", predictions)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_page_of_what_the_programs_wrote(written, tmp_path):
    page = build(tmp_path, *(written / name for name in ("sweep", "full", "early", "judge")))
    sections = {"trade-off", "table", "batches", "depth", "calibration", "tokens", "oracle", "judge"}
    assert sections <= page.sections
    rows = {row["name"]: row for row in read_csv(tmp_path)}
    figures = json.loads((written / "sweep/sweep.json").read_text())["rows"]
    assert set(rows) == {row["name"] for row in figures} | {"full", "early"}
    for row in figures:
        assert float(rows[row["name"]]["bleu"]) == row["bleu"]
        assert float(rows[row["name"]]["speedup"]) == row["speedup"]
    full, early = (json.loads((written / name / "predict_results.json").read_text())
                   for name in ("full", "early"))  # fmt: skip
    assert float(rows["early"]["quality_share"]) == pytest.approx(100 * early["bleu"] / full["bleu"])
    assert rows["early"]["method"] == "FREE" and rows["full"]["method"] == "Full depth"
    early = lines(written / "early/predictions_test.jsonl")
    mixed = [record for record in early if len(set(record["exit_layers"])) > 1]
    assert mixed and all(record["source"] in page.text for record in mixed)


def test_runs_and_sweeps_write_the_same_records(written):
    """A setting's records are a run's, but for the time; neither says what it does not know."""
    of_sweep = [row for row in lines(written / "sweep/records.jsonl") if row["setting"] == "FREE 0.4"]
    of_run = lines(written / "early/predictions_test.jsonl")
    assert len(of_sweep) == len(of_run) == SAMPLES
    for ours, theirs in zip(of_sweep, of_run, strict=True):
        same = set(theirs) - {"seconds", "source"}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        assert set(ours) - set(theirs) == {"setting", "row"} and None not in theirs.values()
    (results,) = read_folders([written / "sweep"]).sets
    by_name = {setting.name: setting for setting in results.settings}
    adaptive = by_name["FREE adaptive 0.8"]
    assert (adaptive.threshold, adaptive.zeta, by_name["FREE 0.4"].zeta) == (None, 0.8, None)
    assert [record.as_row() for record in by_name["FREE 0.4"].records] == of_sweep
    assert all(trace.confidences.shape[1] == 8 for trace in by_name["Full depth"].traces.values())
    assert set(by_name["Full depth"].traces) == set(range(SAMPLES))


def test_a_calibration_is_no_result_to_report(written):
    assert (written / "calibration/records.jsonl").is_file()
    with pytest.raises(UserError, match="calibration: no results here; expected"):
        read_folders([written / "calibration"])


READERS = {  # what a program needs besides rows, and what it reads first
    train_tokenizer: ([], "train"),
    choose_exit: (["--model_name_or_path", CHECKPOINT], "validation"),
    train_exit: (["--model_name_or_path", CHECKPOINT], "train"),
    sweep: (["--free", CHECKPOINT], "test"),
}


@pytest.mark.parametrize("module", READERS, ids=lambda module: module.__name__)
def test_rows_that_cannot_be_used_are_listed_in_every_output_folder(module, tmp_path, monkeypatch, caplog):
    reader = "load_examples" if module is train_tokenizer else "read_split"
    read = getattr(module, reader)

    def read_and_stop(*arguments):
        read(*arguments)
        raise UserError("read")

    monkeypatch.setattr(module, reader, read_and_stop)
    flags, split = READERS[module]
    rows = tmp_path / "rows.csv"
    rows.write_text("text,title\na,b\n,c\n")
    columns = ["--task", "summarization", "--source_column", "text", "--target_column", "title"]
    folder = tmp_path / "out"
    with pytest.raises(SystemExit):
        module.main([*flags, *columns, f"--{split}_file", str(rows), "--output_dir", str(folder)])
    (listed,) = (folder / f"skipped_rows.{split}.jsonl").read_text().splitlines()
    assert json.loads(listed) == {"origin": str(rows), "row": 1, "id": "1", "reason": "empty source"}
    assert f"skipped 1 of 2 rows (listed in {folder / f'skipped_rows.{split}.jsonl'})" in caplog.text


LIGHT = """
import sys

import models.errors
heavy = {"torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets", "accelerate"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Blocker())
import gpt_eval.__main__
import scripts.report
folder, output = sys.argv[1:]
scripts.report.main([f"{folder}/sweep", f"{folder}/early", "--output_dir", f"{output}/report"])
files = ["--requests", f"{folder}/judge/requests.jsonl", "--answers", f"{folder}/judge/answers.jsonl"]
assert gpt_eval.__main__.main(["score", *files, "--output_dir", f"{output}/judge"]) == 0
assert "matplotlib.pyplot" not in sys.modules  # it chooses a backend
"""


@pytest.mark.slow
def test_reports_and_scores_need_neither_torch_nor_transformers(written, tmp_path):
    command = [sys.executable, "-c", LIGHT, str(written), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    page = Page(tmp_path / "report/report.html")
    assert {"trade-off", "table", "tokens", "oracle"} <= page.sections
    ours, theirs = (json.loads((folder / "judge/scores.json").read_text()) for folder in (tmp_path, written))
    assert ours == theirs and (tmp_path / "judge/scores.png").read_bytes().startswith(b"\x89PNG")
