"""Stage one on a GPU: its losses against the CPU's, precisions, workers, resume, the teacher's cache, a replay."""

import math
from pathlib import Path

import pytest
import torch

from nst_det.distillation.build import Teacher
from nst_det.distillation.dataloader import StageOneData
from nst_det.distillation.replay import rebuild
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.checkpoint import load_latest_checkpoint
from nst_det.engine.keys import COMPILE_MODES
from nst_det.engine.loader import load
from nst_det.engine.nan_guard import read_step, replay
from nst_det.errors import UserError
from nst_det.models import load_backbone

pytestmark = pytest.mark.gpu
METHOD = "kd+nst-poly"
CROPPED = {"DATA.AUGMENT.CROP_AREA": [0.3, 1.0], "DATA.AUGMENT.COLOR_JITTER": [0.4, 0.4, 0.4, 0.1]}


def losses(row):
    return {name: value for name, value in row.items() if name.startswith(("loss/", "level/"))}


def test_methods_side_by_side_in_bfloat16(backbones):
    assert set(losses(backbones["rows"][METHOD][0])) >= {"loss/ce", "loss/kd", "loss/nst-poly", "loss/total"}
    for word, rows in backbones["rows"].items():
        assert [row["step"] for row in rows] == [0, 1, 2, 3]
        assert all(math.isfinite(value) for row in rows for value in losses(row).values())
        weights, card = load_backbone(backbones[word]["backbone"])
        assert card.method == word
        assert all(bool(value.isfinite().all()) for value in weights.values())
    # all begin with the same weights and the same batch
    assert len({rows[0]["loss/ce"] for rows in backbones["rows"].values()}) == 1


def test_the_first_step_in_float32_has_the_losses_of_the_cpu(stage_one, from_teacher, tmp_path):
    keys = {**from_teacher, "METHODS": [METHOD, "fitnet+at"], "SOLVER.MAX_ITER": 1}
    ours, wanted = stage_one(tmp_path / "here", keys)["rows"], stage_one(tmp_path / "cpu", keys, on="cpu")["rows"]
    for word, rows in wanted.items():
        assert losses(ours[word][0]) == pytest.approx(losses(rows[0]), rel=1e-3), word


def test_float16_with_its_loss_scale(stage_one, from_teacher, tmp_path, gpu_device):
    if gpu_device == "cpu":
        pytest.skip("float16 needs a GPU")
    rows = stage_one(tmp_path, {**from_teacher, "SOLVER.AMP.DTYPE": "fp16"})["rows"][METHOD]
    assert all(math.isfinite(value) for row in rows for value in losses(row).values())
    state = load_latest_checkpoint(tmp_path / "students" / METHOD / "checkpoints")
    assert state["scaler"]["scale"] > 0


@pytest.mark.parametrize("mode", COMPILE_MODES[1:])
def test_compiled_networks_have_the_losses_of_plain_ones(stage_one, from_teacher, tmp_path, mode, gpu_device, caplog):
    if gpu_device == "cpu" and mode != "default":
        pytest.skip("CUDA graphs need a GPU")
    keys = {**from_teacher, "METHODS": ["ce", METHOD], "SOLVER.EMA_DECAY": 0.9}
    plain = stage_one(tmp_path / "plain", keys)["rows"]
    found = stage_one(tmp_path / "compiled", {**keys, "SOLVER.COMPILE": mode})["rows"]
    for word, rows in plain.items():
        assert losses(found[word][0]) == pytest.approx(losses(rows[0]), rel=1e-3), word
        assert losses(found[word][-1]) == pytest.approx(losses(rows[-1]), rel=0.02), word
    # none of them ran as it is
    assert "SOLVER.COMPILE" not in caplog.text


def test_workers_give_the_batches_of_this_process(stage_one_config, tmp_path, gpu_device):
    # a GPU is in use before workers are started, as in every run
    torch.zeros(1, device=gpu_device)
    found = []
    for workers in (0, 2):
        config = stage_one_config(tmp_path, {**CROPPED, "DATALOADER.NUM_WORKERS": workers})
        data = StageOneData(config)
        batches = data.training(config.DATA.AUGMENT, config.SOLVER, data.views())
        found.append(list(load(batches, range(5), workers)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_run_that_resumes(stage_one, from_teacher, tmp_path, stops_after_saving, monkeypatch, gpu_device):
    whole = stage_one(tmp_path / "whole", from_teacher)["rows"][METHOD]
    with stops_after_saving(2), pytest.raises(UserError, match="stopped"):
        stage_one(tmp_path / "stopped", from_teacher)
    devices = set()
    resume = StudentTrainer.resume

    def resumed_here(self):
        resume(self)
        states = [*self.optimizer.state.values(), {"model": next(self.model.parameters())}]
        devices.update(v.device.type for state in states for v in state.values() if torch.is_tensor(v) and v.dim())
        assert self.step == 2

    monkeypatch.setattr(StudentTrainer, "resume", resumed_here)
    resumed = stage_one(tmp_path / "stopped", from_teacher)["rows"][METHOD]
    assert devices == {gpu_device}
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    for one, other in zip(resumed, whole):
        assert losses(one) == pytest.approx(losses(other), rel=0.02)


def test_the_teachers_cache_gives_what_the_teacher_gives(stage_one, from_teacher, tmp_path):
    keys = {**from_teacher, "CACHE.VIEWS": 1}
    asked = stage_one(tmp_path / "asked", keys)["rows"][METHOD]
    kept = stage_one(tmp_path / "kept", {**keys, "CACHE.DIR": tmp_path / "cache"})["rows"][METHOD]
    assert any((tmp_path / "cache").rglob("*"))
    assert losses(kept[0]) == pytest.approx(losses(asked[0]), rel=1e-3)
    assert losses(kept[-1]) == pytest.approx(losses(asked[-1]), rel=0.02)


def test_a_non_finite_step_is_run_again(stage_one, from_teacher, tmp_path, monkeypatch):
    ask = Teacher.__call__

    def asked(self, images, rows):
        outputs = ask(self, images, rows)
        outputs.maps["res4"] = torch.full_like(outputs.maps["res4"], math.nan)
        return outputs

    monkeypatch.setattr(Teacher, "__call__", asked)
    with pytest.raises(UserError, match="not finite at step 0"):
        stage_one(tmp_path, from_teacher)
    (file,) = Path(tmp_path).rglob("step-*.pt")
    found = replay(read_step(file), file, rebuild)
    assert found.same
    assert found.terms["ce"] == pytest.approx(found.recorded["ce"], rel=1e-4)
