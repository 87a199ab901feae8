"""Several processes that train by Detectron2 stop together, and answer alike to a loss that is not finite."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from nst_det.detectron2.replay import rebuild
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import read_step, replay


@pytest.fixture
def together(in_processes, train):
    """``together(folder, *words)``: the exit codes of two processes that torchrun would have started."""
    return lambda folder, *words: in_processes(train, folder, *words)


def test_a_signal_to_one_stops_all_and_the_same_command_resumes(together, same_run, tmp_path, at_step, capfd):
    assert together(tmp_path / "whole") == [0, 0]
    capfd.readouterr()
    with at_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM), rank=1):
        assert together(tmp_path / "run") == [75, 75]
    printed = capfd.readouterr().err
    assert printed.count("nst-det: stopped by SIGTERM") == 1
    assert "Traceback" not in printed
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000003.pth"
    assert together(tmp_path / "run") == [0, 0]
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def poisoned_proposals(monkeypatch):
    forward = StandardRPNHead.forward

    def poisoned(self, features):
        logits, deltas = forward(self, features)
        if self.training and get_event_storage().iter == 2 and comm.get_rank() == 1:
            logits = [level * math.nan for level in logits]
        return logits, deltas

    return lambda: monkeypatch.setattr(StandardRPNHead, "forward", poisoned)


@pytest.mark.parametrize("named", ["loss_cls", "the RPN's proposals (Predicted boxes"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_all_answer_alike(together, tmp_path, poisoned, poisoned_proposals, capfd, named, policy):
    if named == "loss_cls":
        poisoned(2, rank=1)
    else:
        poisoned_proposals()
    folder = tmp_path / "run"
    codes = together(folder, "SOLVER.NON_FINITE.POLICY", policy, "SOLVER.IMS_PER_BATCH", 4)
    assert codes == ([2, 2] if policy == "stop" else [0, 0])
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    content = read_step(folder / "nonfinite" / "step-00000002.pt")
    assert content["not_finite"][0].startswith(named)
    assert content["rank"] == 1
    # the images of the process in which it was found
    assert content["images"] == [item["image_id"] for item in content["batch"]]
    if policy == "stop":
        assert printed.count(f"nst-det: not finite at step 2: {named}") == 1
        return
    rows = read_metrics(folder / "metrics.jsonl")
    assert ["total_loss" in row for row in rows] == [True, True, False, True, True, True]


def test_a_step_of_the_second_process_runs_again(together, tmp_path, at_step):
    def poison(trainer):
        with torch.no_grad():
            trainer.student.roi_heads.box_predictor.bbox_pred.bias.fill_(math.inf)

    with at_step(2, poison, rank=1):
        assert together(tmp_path / "run") == [2, 2]
    file = tmp_path / "run" / "nonfinite" / "step-00000002.pt"
    content = read_step(file)
    assert (content["rank"], content["not_finite"]) == (1, ["loss_box_reg"])
    again, other = replay(content, file, rebuild), replay({**content, "rank": 0}, file, rebuild)
    assert (again.broken, again.first) == (["loss_box_reg"], "roi_heads.box_predictor.bbox_pred")
    # what this process drew, and not the first one
    recorded, same, others = (
        [terms[name] for name in ("loss_rpn_cls", "loss_rpn_loc")]
        for terms in (content["terms"], again.terms, other.terms)
    )
    assert recorded == same
    assert recorded != others


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one of them", "the command"])
def test_a_signal_to_detectron2s_own_processes(tiny_yaml, tmp_path, who):
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "nst_det", "train-det", "--config-file", tiny_yaml, "--num-gpus", "2"]
    words += ["OUTPUT_DIR", folder, "DATASETS.TEST", "[]", "SOLVER.MAX_ITER", "100000", "SOLVER.STEPS", "[]"]
    with open(tmp_path / "printed", "wb") as printed:
        process = subprocess.Popen(
            [str(word) for word in words], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=printed, stderr=printed
        )
    try:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or len(read_metrics(metrics)) < 3:
            assert process.poll() is None, (tmp_path / "printed").read_text()
            time.sleep(0.1)
        started = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        assert len(started) == 2
        (started[1] if who == "one of them" else process).send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    assert not any(one.is_running() for one in started)
    text = (tmp_path / "printed").read_text()
    assert text.strip().splitlines()[-1].startswith("nst-det: stopped by SIGTERM")
    assert "Traceback" not in text
    # all that was done is saved
    last = int((folder / "last_checkpoint").read_text().removeprefix("model_").removesuffix(".pth"))
    assert last == read_metrics(metrics)[-1]["step"]
    assert torch.load(folder / f"model_{last:07d}.pth")["iteration"] == last
    assert json.loads((folder / "config.json").read_text())["SOLVER.MAX_ITER"] == 100000
