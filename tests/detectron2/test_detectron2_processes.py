"""Several processes that train by Detectron2: they stop together, and answer alike to a loss that is no number."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

import psutil  # noqa: E402
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead  # noqa: E402
from detectron2.utils import comm  # noqa: E402
from detectron2.utils.events import get_event_storage  # noqa: E402

from nst_det.detectron2 import DistillTrainer  # noqa: E402
from nst_det.detectron2.hooks import FiniteCheck  # noqa: E402
from nst_det.detectron2.replay import rebuild  # noqa: E402
from nst_det.engine.metrics import read_metrics  # noqa: E402
from nst_det.engine.nan_guard import read_step, replay  # noqa: E402

RPN = ("loss_rpn_cls", "loss_rpn_loc")


@pytest.fixture
def together(in_processes, command, tiny_yaml):
    """``together(folder, *words)``: the exit codes of two processes that torchrun would have started."""

    def run(folder, *words):
        return in_processes(
            command, "--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder, *map(str, words)
        )

    return run


def test_a_signal_to_one_stops_all_and_the_same_command_goes_on(together, same_run, tmp_path, monkeypatch, capfd):
    assert together(tmp_path / "whole") == [0, 0]
    run_step = DistillTrainer.run_step

    def signalled(self):
        if self.iter == 3 and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        run_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "run_step", signalled)
        capfd.readouterr()
        assert together(tmp_path / "run") == [75, 75]
    said = capfd.readouterr().err
    assert said.count("nst-det: stopped by SIGTERM; what is done is saved") == 1
    assert "Traceback" not in said
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000003.pth"
    assert together(tmp_path / "run") == [0, 0]
    same_run(tmp_path / "run", tmp_path / "whole")


def poison_loss(monkeypatch):
    see = FiniteCheck.see_losses

    def poisoned(self, model, inputs, losses):
        if self.trainer.iter == 2 and comm.get_rank() == 1:
            with torch.no_grad():
                losses["loss_cls"].mul_(math.nan)
        see(self, model, inputs, losses)

    monkeypatch.setattr(FiniteCheck, "see_losses", poisoned)


def poison_proposals(monkeypatch):
    forward = StandardRPNHead.forward

    def poisoned(self, features):
        logits, deltas = forward(self, features)
        if self.training and get_event_storage().iter == 2 and comm.get_rank() == 1:
            logits = [level * math.nan for level in logits]
        return logits, deltas

    monkeypatch.setattr(StandardRPNHead, "forward", poisoned)


@pytest.mark.parametrize(
    ("poison", "named"), [(poison_loss, "loss_cls"), (poison_proposals, "the RPN's proposals (Predicted boxes")]
)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_is_no_number_in_one_is_met_by_all(together, tmp_path, monkeypatch, capfd, poison, named, policy):
    poison(monkeypatch)
    folder = tmp_path / "run"
    codes = together(folder, "SOLVER.NON_FINITE.POLICY", policy, "SOLVER.IMS_PER_BATCH", 4)
    assert codes == ([2, 2] if policy == "stop" else [0, 0])
    said = capfd.readouterr().err
    assert "Traceback" not in said
    content = read_step(folder / "nonfinite" / "step-00000002.pt")
    assert content["not_finite"][0].startswith(named)
    assert content["rank"] == 1
    # the images of the process in which it was found
    assert content["images"] == [item["image_id"] for item in content["batch"]]
    if policy == "stop":
        assert said.count(f"nst-det: not finite at step 2: {named}") == 1
        return
    rows = read_metrics(folder / "metrics.jsonl")
    assert ["total_loss" in row for row in rows] == [True, True, False, True, True, True]


def test_a_step_of_the_second_process_runs_again(together, tmp_path, monkeypatch, capfd):
    run_step = DistillTrainer.run_step

    def poisoned(self):
        if self.iter == 2 and comm.get_rank() == 1:
            with torch.no_grad():
                self.student.roi_heads.box_predictor.bbox_pred.bias.fill_(math.inf)
        run_step(self)

    monkeypatch.setattr(DistillTrainer, "run_step", poisoned)
    assert together(tmp_path / "run") == [2, 2]
    file = tmp_path / "run" / "nonfinite" / "step-00000002.pt"
    content = read_step(file)
    assert (content["rank"], content["not_finite"]) == (1, ["loss_box_reg"])
    again = replay(content, file, rebuild)
    assert (again.broken, again.first) == (["loss_box_reg"], "roi_heads.box_predictor.bbox_pred")
    # what this process drew, and not the first one
    assert [again.terms[name] for name in RPN] == [content["terms"][name] for name in RPN]
    other = replay({**content, "rank": 0}, file, rebuild)
    assert [other.terms[name] for name in RPN] != [content["terms"][name] for name in RPN]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one of them", "the command"])
def test_a_signal_to_detectron2s_own_processes(tiny_yaml, tmp_path, who):
    folder = tmp_path / "run"
    words = [sys.executable, "-m", "nst_det", "train-det", "--config-file", tiny_yaml, "--num-gpus", "2"]
    words += ["OUTPUT_DIR", folder, "DATASETS.TEST", "[]", "SOLVER.MAX_ITER", "100000", "SOLVER.STEPS", "[]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen([str(word) for word in words], env=environment, stdout=said, stderr=said)
    try:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or len(read_metrics(metrics)) < 3:
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        started = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        assert len(started) == 2
        (started[1] if who == "one of them" else process).send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    finally:
        process.kill()
        process.wait()
    assert not any(one.is_running() for one in started)
    text = (tmp_path / "said").read_text()
    assert text.strip().splitlines()[-1].startswith("nst-det: stopped by SIGTERM; what is done is saved")
    assert "Traceback" not in text
    # all that was done is saved
    last = int((folder / "last_checkpoint").read_text().removeprefix("model_").removesuffix(".pth"))
    assert last == read_metrics(metrics)[-1]["step"]
    state = torch.load(folder / f"model_{last:07d}.pth")
    assert state["iteration"] == last
    assert json.loads((folder / "config.json").read_text())["SOLVER.MAX_ITER"] == 100000
