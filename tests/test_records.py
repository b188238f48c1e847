"""Result files: what is written is read back, as it was measured; what is no record is refused by line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_comparison import LAYERS_ONLY, make_trace

from models.errors import UserError
from util.evaluation.cost_model import predict_free
from util.evaluation.records import Record, Setting, Trace, collect_outputs, read_records, write_records

LINE = {
    "id": "s0",
    "prediction": "a\u2028b",
    "reference": ["x", "y"],
    "tokens": 2,
    "pieces": ["▁a", "</s>"],
    "exit_layers": [2, 8],
    "seconds": 0.25,
    "layer_calls": 10.0,
    "layer_tokens": 16.0,
    "full_layer_calls": 16.0,
    "deep_passes": 1.0,
    "rollbacks": 0.0,
    "proposed_tokens": 0.0,
    "accepted_proposals": 0.0,
}


def test_a_record_is_what_its_line_says(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | {"exit_layers": None, "window": 3}))
    with pytest.raises(UserError, match=r"records\.jsonl, line 2: a window lacks its sequence_score"):
        list(read_records(path))
    path.write_text(json.dumps(LINE | {"calibration": [[0.5, 1]], "threshold": 0.4, "unknown": 1}) + "\n")
    ((place, record),) = read_records(path)
    assert place == f"{path}, line 1" and record.calibration == [[0.5, 1]] and record.source is None
    write_records(path, [record])
    assert json.loads(path.read_text()) == LINE | {"calibration": [[0.5, 1]], "threshold": 0.4}
    beyond = LINE | {"pieces": ["▁a", None]}  # models have more tokens than their tokenizers
    assert Record.from_row(beyond, "").as_row() == beyond
    assert "exit_layers" in Record.from_row(LINE | {"exit_layers": None}, "").as_row()  # said, not left out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "2"}, 'line 7: tokens must be a whole number, not "2"'),
        ({"seconds": None}, "line 7: seconds must be a number, not null"),
        ({"pieces": ["a", 5]}, "line 7: pieces must be a list"),
        ({"reference": 5}, "line 7: reference must be a text or a list"),
        ({"id": 1.5}, "line 7: id must be a text, not 1.5"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(UserError, match=message):
        Record.from_row(LINE | change, "line 7")
    lacking = {name: value for name, value in LINE.items() if name not in change}
    with pytest.raises(UserError, match=f"line 7: lacks {next(iter(change))}"):
        Record.from_row(lacking, "line 7")


def test_a_setting_keeps_its_records_in_files_of_their_own():
    setting = Setting("FREE 0.4", "FREE", "free", 0.4, 2, num_layers=8, records=[Record.from_row(LINE, "")])
    row = setting.as_row()
    assert row == {
        "name": "FREE 0.4",
        "method": "FREE",
        "checkpoint": "free",
        "threshold": 0.4,
        "zeta": None,
        "shallow_layer": 2,
        "batch_size": 1,
        "num_layers": 8,
    }
    assert setting.exit_layers == [2, 8] and Setting.from_row(row, "").records == []


def test_outputs_of_another_system_are_one_a_sample():
    windows = [{"id": 1, "prediction": text, "window": index, "sequence_score": -1.0 - index}
               for index, text in enumerate("ab")]  # fmt: skip
    rows = [("line 1", windows[1]), ("line 2", windows[0])]
    assert [(output.id, output.prediction) for output in collect_outputs(rows, "file")] == [("1", "a")]
    for second, message in (
        (windows[1], "line 2: the id '1' is there twice"),
        ({"id": "2", "prediction": ""}, "file: some predictions are of windows"),
    ):
        with pytest.raises(UserError, match=message):
            collect_outputs([("line 1", windows[1]), ("line 2", second)], "file")
    with pytest.raises(UserError, match="file: there are no predictions"):
        collect_outputs([], "file")


def test_confidences_are_compared_as_measured(tmp_path):
    """0.40001 exceeds 0.4 and 0.39996 does not, though both are 0.4000 to four digits."""
    measured = np.array([[0.40001, 1.0], [0.39996, 1.0], [1 / 3, 1.0]], np.float32).astype(float)
    trace = make_trace(measured, np.ones((3, 2), bool))
    path = tmp_path / "traces.jsonl"
    write_records(path, [trace])
    read = Trace.from_row(json.loads(path.read_text()), 2, "")
    for one in (trace, read):
        assert one.confidences.tolist() == measured.tolist()
        assert predict_free(LAYERS_ONLY, [one], 1, 0.4).exit_share == pytest.approx(1 / 3)
        assert predict_free(LAYERS_ONLY, [one], 1, measured[2, 0]).exit_share == pytest.approx(2 / 3)
    assert "0.40001," in path.read_text()  # no more digits than a 32-bit number has
