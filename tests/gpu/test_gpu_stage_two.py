"""Stage two on a GPU, by both engines: its losses against the CPU's, precision, workers, resume."""

import itertools
import math

import pytest
import torch

from nst_det.detection.config import load_detect_config
from nst_det.detection.data import data_classes, open_voc, training_batches
from nst_det.engine.io import read_json
from nst_det.engine.keys import COMPILE_MODES
from nst_det.engine.train_state import OptimizedState
from nst_det.errors import UserError

pytestmark = pytest.mark.gpu
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
# devices draw differently, so all anchors and proposals are taken
EXHAUSTIVE = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}


@pytest.fixture(params=ENGINES)
def engine(request):
    if request.param == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    return request.param


def losses(row):
    return {name: value for name, value in row.items() if "loss" in name and name != "total_loss"}


def test_a_student_in_mixed_precision(engine, stage_two, taught, tmp_path):
    rows = stage_two(tmp_path / "run", engine, {**taught(engine), "SOLVER.AMP.ENABLED": True})
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    names = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_transfer_nst-poly"}
    for row in rows:
        assert set(losses(row)) == names
        assert all(math.isfinite(value) for value in losses(row).values())
    result = read_json(tmp_path / "run" / "result.json")
    assert result["engine"] == engine
    assert 0 <= result["map"] <= 1


def test_the_first_step_in_float32_has_the_losses_of_the_cpu(engine, stage_two, taught, tmp_path):
    keys = {**taught(engine), **EXHAUSTIVE, "SOLVER.AMP.ENABLED": False, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": []}
    (ours,), (wanted,) = stage_two(tmp_path / "here", engine, keys), stage_two(tmp_path / "cpu", engine, keys, on="cpu")
    alone = ("loss_rpn_cls", "loss_rpn_loc", "loss_transfer_nst-poly")
    assert [ours[name] for name in alone] == pytest.approx([wanted[name] for name in alone], rel=1e-3)
    # proposals of nearly equal scores may change places
    assert losses(ours) == pytest.approx(losses(wanted), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("mode", COMPILE_MODES[1:])
def test_a_compiled_student_has_the_losses_of_a_plain_one(stage_two, taught, tmp_path, mode, gpu_device, capfd):
    if gpu_device == "cpu" and mode != "default":
        pytest.skip("CUDA graphs need a GPU")
    keys = {**taught("torchvision"), "SOLVER.AMP.ENABLED": False, "DATASETS.TEST": []}
    # padded alike
    keys |= {"INPUT.MAX_SIZE_TRAIN": 128, "INPUT.PADDED_SIZES": [[96, 128], [128, 96], [128, 128]]}
    plain = stage_two(tmp_path / "plain", "torchvision", keys)
    found = stage_two(tmp_path / "compiled", "torchvision", {**keys, "SOLVER.COMPILE": mode})
    assert "SOLVER.COMPILE:" not in capfd.readouterr().err
    assert losses(found[0]) == pytest.approx(losses(plain[0]), rel=1e-3, abs=1e-4)
    assert losses(found[-1]) == pytest.approx(losses(plain[-1]), rel=0.05, abs=1e-2)


def test_workers_give_the_batches_of_this_process(engine, detector_config, detector_words, tmp_path, gpu_device):
    torch.zeros(1, device=gpu_device)
    found = []
    for workers in (0, 2):
        words = detector_words(tmp_path, engine, {"DATALOADER.NUM_WORKERS": workers, "SEED": 5})
        if engine == "torchvision":
            config = load_detect_config(detector_config, words)
            batches = training_batches(config, open_voc(config, "DATASETS.TRAIN", data_classes(config)), 5, 0)
        else:
            from nst_det.detectron2.config import load_config, register_datasets
            from nst_det.detectron2.data import build_train_loader

            config = load_config(detector_config, words)
            register_datasets(config)
            batches = iter(build_train_loader(config))
        found.append([(item["image_id"], item["image"]) for batch in itertools.islice(batches, 5) for item in batch])
    for one, other in zip(*found, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_a_run_that_resumes(engine, stage_two, taught, tmp_path, stops_after_saving, monkeypatch, gpu_device):
    keys = {**taught(engine), "SOLVER.AMP.ENABLED": False, "DATASETS.TEST": []}
    whole = stage_two(tmp_path / "whole", engine, keys)
    devices = set()

    def note(optimizer):
        for state in optimizer.state.values():
            devices.update(value.device.type for value in state.values() if torch.is_tensor(value) and value.dim())

    if engine == "torchvision":
        with stops_after_saving(2), pytest.raises(AssertionError, match="2 == 0"):
            stage_two(tmp_path / "stopped", engine, keys)
        resume = OptimizedState.resume

        def resumed(self):
            resume(self)
            note(self.optimizer)

        monkeypatch.setattr(OptimizedState, "resume", resumed)
    else:
        from nst_det.detectron2 import DistillTrainer

        run_step, load = DistillTrainer.run_step, DistillTrainer.resume_or_load

        def stopping(self):
            if self.iter == 2:
                raise UserError("stopped")
            run_step(self)

        def loaded(self, resume=True):
            load(self, resume)
            note(self.optimizer)

        with monkeypatch.context() as patch:
            patch.setattr(DistillTrainer, "run_step", stopping)
            with pytest.raises(AssertionError, match="2 == 0"):
                stage_two(tmp_path / "stopped", engine, keys)
        monkeypatch.setattr(DistillTrainer, "resume_or_load", loaded)
    again = stage_two(tmp_path / "stopped", engine, keys)
    assert devices == {gpu_device}
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    for one, other in zip(again, whole):
        assert losses(one) == pytest.approx(losses(other), rel=0.05, abs=1e-3)
