"""Losses and gradients that are no numbers with Detectron2's trainer: named, met, and run again from the file."""

import math
import os
import pickle
import signal

import numpy as np
import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from nst_det.cli import main  # noqa: E402
from nst_det.detectron2 import DistillTrainer  # noqa: E402
from nst_det.engine.metrics import read_metrics  # noqa: E402
from nst_det.engine.nan_guard import read_step  # noqa: E402


def test_a_loss_that_is_no_number_is_one_line_with_images_and_file(command, tiny_yaml, tmp_path, poisoned, capfd):
    poisoned(step=2)
    folder = tmp_path / "run"
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    line = said.strip().splitlines()[-1]
    file = folder / "nonfinite" / "step-00000002.pt"
    assert line.startswith("nst-det: not finite at step 2: loss_cls; images i")
    assert f"nst-det replay {file}" in line
    content = read_step(file)
    assert content["not_finite"] == ["loss_cls"]
    assert {"image", "boxes", "labels"} <= set(content["batch"][0])


def test_a_last_step_that_failed_is_not_evaluated(command, tiny_yaml, tmp_path, poisoned):
    poisoned(step=5)
    assert command("--config-file", tiny_yaml, "OUTPUT_DIR", tmp_path / "run") == 2
    assert not (tmp_path / "run" / "inference").exists()


def replayed(file, *words):
    """The exit code of ``nst-det replay``."""
    with pytest.raises(SystemExit) as left:
        main(["replay", *words, str(file)])
    return left.value.code


@pytest.mark.parametrize(
    ("part", "named", "first"),
    [
        ("roi_heads.box_predictor.cls_score.bias", "loss_cls", "student.roi_heads.box_predictor.cls_score"),
        (
            "proposal_generator.rpn_head.objectness_logits.weight",
            "the RPN's proposals (Predicted boxes or scores contain Inf/NaN. Training has diverged.)",
            "student.proposal_generator.rpn_head.objectness_logits",
        ),
        ("", "loss_transfer_fitnet (p3)", "transfer.terms.fitnet.p3"),
    ],
)
def test_the_step_runs_again(command, tiny_yaml, tiny_teacher, tmp_path, monkeypatch, capfd, part, named, first):
    run_step = DistillTrainer.run_step

    def poisoned_step(self):
        if self.iter == 2:
            adapter = self._whole.transfer.terms["fitnet"]["p3"]
            parameter = self.student.get_parameter(part) if part else next(adapter.parameters())
            with torch.no_grad():
                parameter.fill_(math.inf)
        run_step(self)

    monkeypatch.setattr(DistillTrainer, "run_step", poisoned_step)
    folder = tmp_path / "run"
    words = ["METHOD", "fitnet+nst-poly", "TRANSFER.LEVELS", "['p2', 'p3']", "TRANSFER.WARMUP_ITERS", 5]
    words += ["TEACHER.CONFIG_FILE", tiny_teacher[0], "TEACHER.WEIGHTS", tiny_teacher[1]]
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", *words, "OUTPUT_DIR", folder) == 2
    file = folder / "nonfinite" / "step-00000002.pt"
    assert f"not finite at step 2: {named}; images i" in capfd.readouterr().err
    assert replayed(file) == 0
    said = capfd.readouterr().out
    content = read_step(file)
    assert f"not finite now: {named}\nthe same as in the run\nfirst in the layer {first}" in said
    assert f"images: {', '.join(content['images'])}" in said
    assert len(content["images"]) == 2
    terms = {name: value for name, value in content["terms"].items() if math.isfinite(value)}
    for name, value in terms.items():
        row = next(line.split() for line in said.splitlines() if name in line)
        # the same bits, of anchors and proposals that are drawn too
        assert row[3] == row[5] == f"{value:.9g}"
    assert ("loss_rpn_cls" in terms) == ("RPN" not in named)


def test_what_a_strangers_step_may_not_do(command, tiny_yaml, tmp_path, poisoned, capfd):
    poisoned(step=0)
    folder = tmp_path / "run"
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder) == 2
    file = folder / "nonfinite" / "step-00000000.pt"
    (tmp_path / "teacher.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "teacher.pkl").write_bytes(pickle.dumps({"model": {"x": np.zeros(1)}}))

    def refused(says, content, *words):
        torch.save(content, tmp_path / "changed.pt")
        capfd.readouterr()
        assert replayed(tmp_path / "changed.pt", *words) == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said
        assert says in said.strip().splitlines()[-1]

    def taught_by(config_file, weights=""):
        content = torch.load(file)
        config = content["config"]
        config |= {"TRUST_PICKLE": True, "METHOD": "at"}
        config["TRANSFER"]["LEVELS"] = ["p2"]
        config["TEACHER"] |= {"CONFIG_FILE": str(config_file), "WEIGHTS": str(weights)}
        return content

    refused("teacher.py: the teacher's config is Python code", taught_by(tmp_path / "teacher.py"))
    assert not (tmp_path / "ran").exists()
    refused("teacher.py: a LazyConfig without 'model'", taught_by(tmp_path / "teacher.py"), "--trust-pickle")
    assert (tmp_path / "ran").exists()
    (tmp_path / "teacher.yaml").write_text(f"A: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    refused(
        "teacher.yaml: not read: a tag in it or its _BASE_ asks for Python code", taught_by(tmp_path / "teacher.yaml")
    )
    assert not (tmp_path / "made").exists()
    refused("teacher.pkl: not opened: it is a pickle", taught_by(tiny_yaml, tmp_path / "teacher.pkl"))
    for name in ("config", "batch", "model", "rank"):
        refused(f"'{name}'", {key: value for key, value in torch.load(file).items() if key != name})
    masks = torch.load(file)
    masks["config"]["MODEL"]["MASK_ON"] = True
    refused("its file has boxes alone", masks)


def test_a_step_that_is_passed_over_changes_nothing_but_the_batch(command, tiny_yaml, whole, tmp_path, poisoned):
    poisoned(step=2)
    folder = tmp_path / "run"
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "skip"]
    assert command(*words, "OUTPUT_DIR", folder) == 0
    rows, undisturbed = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    assert [row["lr"] for row in rows] == [row["lr"] for row in undisturbed]
    assert rows[:2] == undisturbed[:2]
    assert ["total_loss" in row for row in rows] == [True, True, False, True, True, True]
    # the forward pass of the step that was not made left its mark neither in weights nor in running statistics
    states = [torch.load(path / "model_0000002.pth") for path in (folder, whole)]
    names = [name for name in states[0]["model"] if name.endswith("num_batches_tracked")]
    assert {int(state["model"][names[0]]) for state in states} == {2, 3}
    assert states[0]["trainer"]["non_finite"]["count"] == 1


def test_too_many_steps_to_pass_over(command, tiny_yaml, tmp_path, poisoned, capfd):
    poisoned(step=1)
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "skip"]
    assert command(*words, "SOLVER.NON_FINITE.LIMIT", 1, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", tmp_path / "run") == 0
    poisoned(step=1)
    poisoned(step=2)
    assert command(*words, "SOLVER.NON_FINITE.LIMIT", 1, "OUTPUT_DIR", tmp_path / "other") == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "not finite at step 2: loss_cls; " in line
    assert "(after 1 times skip, SOLVER.NON_FINITE.LIMIT)" in line


@pytest.mark.parametrize(("step", "again"), [(1, 0), (4, 3)])
def test_going_back(command, tiny_yaml, whole, tmp_path, poisoned, step, again):
    poisoned(step)
    folder = tmp_path / "run"
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "back"]
    assert command(*words, "OUTPUT_DIR", folder) == 0
    rows, undisturbed = (read_metrics(path / "metrics.jsonl") for path in (folder, whole))
    assert rows[:again] == undisturbed[:again]
    assert [row["lr"] for row in rows] == [row["lr"] * (0.5 if row["step"] >= again else 1) for row in undisturbed]
    # the first step after it sees the same batch with the same weights
    assert rows[again] == {**undisturbed[again], "lr": rows[again]["lr"]}
    assert all("total_loss" in row for row in rows)


def test_a_run_that_went_back_and_is_stopped_keeps_its_rate(
    command, same_run, tiny_yaml, tmp_path, poisoned, monkeypatch
):
    words = ["--config-file", tiny_yaml, "DATASETS.TEST", "[]", "SOLVER.NON_FINITE.POLICY", "back"]
    poisoned(step=4)
    assert command(*words, "OUTPUT_DIR", tmp_path / "whole") == 0
    poisoned(step=4)
    run_step, seen = DistillTrainer.run_step, []

    def stopped(self):
        seen.append(self.iter)
        if seen.count(3) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        run_step(self)

    monkeypatch.setattr(DistillTrainer, "run_step", stopped)
    assert command(*words, "OUTPUT_DIR", tmp_path / "run") == 75
    monkeypatch.undo()
    assert command(*words, "OUTPUT_DIR", tmp_path / "run") == 0
    same_run(tmp_path / "run", tmp_path / "whole")
