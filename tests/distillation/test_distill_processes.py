"""Stage one in two processes of gloo's against one with the same batch."""

import pytest
import torch
from safetensors.torch import load_file

from nst_det.distillation.config import load_distill_config
from nst_det.distillation.dataloader import TrainingBatches
from nst_det.distillation.pipeline import StageOne, distill
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.metrics import read_metrics

METHODS = ["kd+fitnet:1"]


def config(images, output, **keys):
    values = {
        "NAME": "small",
        "OUTPUT_DIR": str(output),
        "REGISTRY": str(output / "backbones"),
        "METHODS": METHODS,
        "DATA.ROOT": str(images),
        "DATA.IMAGE_SIZE": 32,
        "DATA.AUGMENT": {"SHIFT": 2, "HFLIP": 0.5, "CROP_AREA": [0.5, 1.0]},
        "TEACHER.ARCH": "nst_resnet10_w32",
        "TEACHER.SOLVER": {"MAX_ITER": 2},
        "SOLVER": {"BASE_LR": 0.0005, "MAX_ITER": 20, "IMS_PER_BATCH": 8, "SYNC_BN": True, "AMP": {"ENABLED": False}},
        "TEST": {"EVAL_PERIOD": 10, "IMS_PER_BATCH": 5},
        "LOG_PERIOD": 1,
        **keys,
    }
    return load_distill_config(None, [str(word) for pair in values.items() for word in pair])


def weights(results, method):
    return load_file(results[method]["backbone"])


def test_two_processes_train_as_one(images, tmp_path, in_processes):
    alone = distill(config(images, tmp_path / "one"))
    first, second = in_processes(distill, config(images, tmp_path / "two"))
    assert first == second
    for method in METHODS:
        one, two = (read_metrics(tmp_path / run / "students" / method / "metrics.jsonl") for run in ("one", "two"))
        assert len([row for row in two if "loss/total" in row]) == 20
        for mine, shared in zip(one, two):
            assert shared == pytest.approx(mine, rel=1e-5, abs=1e-7)
        assert first[method]["top1"] == alone[method]["top1"]
        for name, value in weights(alone, method).items():
            torch.testing.assert_close(weights(first, method)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def distilled(made):
    """The results, and what is written by the first process as this one has it, by the student's word."""
    kept, close = {}, StudentTrainer.close

    def closing(self):
        kept[self.word] = self.eval_model.state_dict()
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentTrainer, "close", closing)
        return distill(made), kept


def test_two_processes_go_on_with_the_same_bits(images, tmp_path, in_processes, stops_after_saving):
    # normalization of its own in each process, a batch in parts, and an average of the weights
    solver = {"MAX_ITER": 6, "IMS_PER_BATCH": 8, "ACCUMULATE": 2, "EMA_DECAY": 0.5}
    keys = {"SOLVER": solver, "SOLVER.CHECKPOINT_PERIOD": 2, "METHODS": ["kd"]}
    (undisturbed, kept), (_, other) = in_processes(distilled, config(images, tmp_path / "one", **keys))
    assert all(torch.equal(other["kd"][name], value) for name, value in kept["kd"].items())
    with stops_after_saving(4):
        (stopped,) = in_processes(distill, config(images, tmp_path / "two", **keys))
        assert str(stopped) == "stopped"
    gone_on = in_processes(distill, config(images, tmp_path / "two", **keys))[0]
    assert gone_on["kd"]["sha256"] == undisturbed["kd"]["sha256"]
    rows = [read_metrics(tmp_path / run / "students" / "kd" / "metrics.jsonl") for run in ("one", "two")]
    assert rows[0] == rows[1]


def test_shares_of_a_batch_are_the_batch(images, tmp_path):
    stage = StageOne(config(images, tmp_path))
    augment = stage.config.DATA.AUGMENT
    whole = stage.data.train_steps(augment, 8)(3, 4)
    store = stage.data._train_store(augment)
    halves = [TrainingBatches(store, 8, 0, augment, None, slice(4 * rank, 4 * rank + 4))[3] for rank in range(2)]
    (batch,) = whole
    assert torch.equal(batch.images, torch.cat([half.images for half in halves]))
    assert torch.equal(batch.labels, torch.cat([half.labels for half in halves]))
    assert batch.names == halves[0].names + halves[1].names
    assert [part.names for part in batch.split(2)] == [half.names for half in halves]


def test_a_batch_that_cannot_be_shared_out_is_refused(images, tmp_path, in_processes):
    keys = {"SOLVER": {"IMS_PER_BATCH": 6, "ACCUMULATE": 2}, "METHODS": ["ce"]}
    found = in_processes(distill, config(images, tmp_path, **keys))
    assert "6 images a step can't be shared out to 2 processes of 2 parts each; use a multiple" in str(found[0])


def test_lp_says_whose_neighbors_it_finds(images, tmp_path, caplog):
    keys = {"SOLVER": {"MAX_ITER": 1, "IMS_PER_BATCH": 8, "ACCUMULATE": 2}, "METHODS": ["lp"]}
    distill(config(images, tmp_path, **keys))
    assert "lp finds a sample's neighbors among the 4 images that are computed together" in caplog.text
