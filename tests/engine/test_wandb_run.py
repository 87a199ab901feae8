import importlib.util
import json
import struct

import pytest

from nst_det.engine import metrics as wandb_run
from nst_det.engine.metrics import MetricsWriter, read_metrics
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError


def test_without_wandb_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    wandb_run.check_wandb("", "a.yaml")
    with pytest.raises(UserError, match="WANDB 'shapes': wandb is not installed; pip install wandb") as error:
        wandb_run.check_wandb("shapes", "a.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="wandb is not installed"):
        MetricsWriter(tmp_path / "metrics.jsonl", wandb="shapes")


class Recorder:
    """Takes what a wandb run is given."""

    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


def test_each_step_is_handed_on(tmp_path, monkeypatch):
    recorder, asked = Recorder(), []

    class Run(wandb_run.WandbRun):
        def __init__(self, project, folder):
            asked.append((project, folder))
            self._run = recorder

    monkeypatch.setattr("nst_det.engine.metrics.WandbRun", Run)
    with MetricsWriter(tmp_path / "metrics.jsonl", wandb="shapes") as metrics:
        metrics.write(0, {"loss": 1.5, "broken": float("nan")})
        metrics.write(1, {"loss": 0.5})
    assert asked == [("shapes", tmp_path)]
    assert recorder.rows == [(0, {"loss": 1.5}), (1, {"loss": 0.5})]
    assert recorder.finished
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 0, "loss": 1.5, "broken": None}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_that_stays_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(tmp_path / "detect" / "seed0" / "kd")
    with folder.opened({"SOLVER.MAX_ITER": 3}), MetricsWriter(folder.metrics_path, wandb="shapes") as metrics:
        for step in range(3):
            metrics.write(step, {"loss_cls": 1 / (step + 1)})
    # its service has written all once it has ended
    importlib.import_module("wandb").teardown()
    written = sorted((folder.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 1
    assert list(history(written[0])) == [(step, 1 / (step + 1)) for step in range(3)]


def history(path):
    """(step, loss_cls) of each line in a file of wandb: 7 bytes, records of crc (4), length (2), kind (1) and data."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = path.read_bytes(), 7
    while at + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        assert kind == 1, "a record in one part, as a small file has them"
        record = Record()
        record.ParseFromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            values = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            yield record.history.step.num, json.loads(values["loss_cls"])
