"""Stage one in two processes of gloo's against one with the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nst_det.distillation.dataloader import StageOneData, TrainingBatches
from nst_det.distillation.pipeline import distill
from nst_det.distillation.trainer import StudentTrainer
from nst_det.engine.distributed import share_of, start_processes
from nst_det.engine.io import read_json
from tests.helpers.stage_one import config as small_config
from tests.helpers.stage_one import metrics, overrides

TOOLS = Path(__file__).resolve().parents[2] / "tools"
METHOD = "kd+fitnet:1"
SOLVER = {
    "OPTIMIZER": "SGD",
    "BASE_LR": 0.0005,
    "WEIGHT_DECAY": 1e-4,
    "MAX_ITER": 20,
    "IMS_PER_BATCH": 8,
    "CLIP_GRADIENTS": {"ENABLED": False},
    "WARMUP_ITERS": 0,
    "SYNC_BN": True,
    "AMP": {"ENABLED": False},
}


def changes(solver, **keys):
    return {
        "METHODS": [METHOD],
        "DATA.AUGMENT.CROP_AREA": [0.5, 1.0],
        "STUDENT.ARCH_KWARGS": {},
        "TEACHER.SOLVER": {"MAX_ITER": 2},
        "SOLVER": {**SOLVER, **solver},
        "TEST": {"EVAL_PERIOD": 10, "IMS_PER_BATCH": 5},
        **keys,
    }


def config(images, output, solver, **keys):
    return small_config(images, output, **changes(solver, **keys))


def test_two_processes_train_as_one(images, tmp_path, in_processes):
    alone = distill(config(images, tmp_path / "one", {}))
    first, second = in_processes(distill, config(images, tmp_path / "two", {}))
    assert first == second
    one, two = (metrics(tmp_path / run, METHOD) for run in ("one", "two"))
    assert len([row for row in two if "loss/total" in row]) == 20
    for mine, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(mine, rel=5e-5, abs=1e-7)
    assert first[METHOD]["top1"] == alone[METHOD]["top1"]
    mine, shared = (load_file(results[METHOD]["backbone"]) for results in (alone, first))
    for name, value in mine.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_torchrun_starts_the_script(images, tmp_path, in_processes):
    first, second = in_processes(distill, config(images, tmp_path / "forked", {"MAX_ITER": 2}))
    (tmp_path / "distill.yaml").write_text("SEED: 0\n")
    command = [str(TOOLS / "distill_backbone.py"), "--config-file", str(tmp_path / "distill.yaml")]
    words = overrides(images, tmp_path / "run", **changes({"MAX_ITER": 2}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *command, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (result,) = (tmp_path / "run" / "students").glob("*/result.json")
    assert read_json(result)["sha256"] == first[METHOD]["sha256"] == second[METHOD]["sha256"]


def test_two_processes_train_from_a_cache_with_synchronized_adapters(images, tmp_path, in_processes):
    # reviewkd's adapters have normalization, which the process that writes can't synchronize with the others
    keys = {"METHODS": ["reviewkd"], "CACHE.DIR": tmp_path / "cache", "CACHE.VIEWS": 1}
    made = config(images, tmp_path, {"MAX_ITER": 2}, **keys)
    first, second = in_processes(distill, made)
    assert first == second


def labels_loss(made, logits, labels):
    start_processes(on_cpu=True)
    student = StudentTrainer.__new__(StudentTrainer)
    student.config, student.solver = made, made.SOLVER
    share = share_of(len(labels), "B")
    mine = logits[share].clone().requires_grad_()
    loss = student._cross_entropy(mine, labels[share])
    loss.backward()
    return loss.detach(), mine.grad


@pytest.mark.parametrize("labels", [[1, -1, 0, 2, -1, -1], [-1] * 6])
def test_the_loss_of_labels_is_the_mean_over_all_labelled_images(images, tmp_path, in_processes, labels):
    made = config(images, tmp_path, {}, **{"DATA.PER_CLASS": 1, "DATA.REST": "unlabelled"})
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(labels)
    whole = labels_loss(made, logits, labels)
    found = in_processes(labels_loss, made, logits, labels)
    # gradients are averaged, too
    together = torch.stack([loss for loss, _ in found]).mean(), torch.cat([gradient for _, gradient in found]) / 2
    torch.testing.assert_close(together, whole)


def distilled(made):
    """The results, and what is written by the first process as this one has it, by the student's name."""
    kept, close = {}, StudentTrainer.close

    def closing(self):
        kept[self.name] = self.eval_model.state_dict()
        close(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentTrainer, "close", closing)
        return distill(made), kept


def test_two_processes_resume_to_the_same_bits(images, tmp_path, in_processes, stops_after_saving):
    # normalization of its own in each process, a batch in parts, and an average of the weights
    solver = {"MAX_ITER": 6, "ACCUMULATE": 2, "EMA_DECAY": 0.5, "SYNC_BN": False, "CHECKPOINT_PERIOD": 2}
    one, two = (config(images, tmp_path / run, solver, METHODS=["kd"]) for run in ("one", "two"))
    (undisturbed, kept), (_, other) = in_processes(distilled, one)
    assert all(torch.equal(other["kd"][name], value) for name, value in kept["kd"].items())
    with stops_after_saving(4):
        (stopped,) = in_processes(distill, two)
        assert str(stopped) == "stopped"
    assert in_processes(distill, two)[0]["kd"]["sha256"] == undisturbed["kd"]["sha256"]
    assert metrics(tmp_path / "one", "kd") == metrics(tmp_path / "two", "kd")


def test_shares_of_a_batch_are_the_batch(images, tmp_path):
    made = config(images, tmp_path, {})
    whole = StageOneData(made).training(made.DATA.AUGMENT, made.SOLVER)
    shares = [slice(4 * rank, 4 * rank + 4) for rank in range(2)]
    halves = [TrainingBatches(whole.store, 8, 0, made.DATA.AUGMENT, None, share)[3] for share in shares]
    batch = whole[3]
    assert torch.equal(batch.images, torch.cat([half.images for half in halves]))
    places = [half.changes.places for half in halves]
    assert torch.equal(batch.changes.places, torch.cat(places))
    assert [part.changes.places.tolist() for part in batch.split(2)] == [some.tolist() for some in places]
    assert torch.equal(batch.labels, torch.cat([half.labels for half in halves]))
    assert batch.names == halves[0].names + halves[1].names
    assert [part.names for part in batch.split(2)] == [half.names for half in halves]


def test_a_batch_that_cannot_be_shared_out_is_refused(images, tmp_path, in_processes):
    solver = {"IMS_PER_BATCH": 6, "ACCUMULATE": 2}
    found = in_processes(distill, config(images, tmp_path, solver, METHODS=["ce"]))
    assert "SOLVER.IMS_PER_BATCH: 6 images a step can't be shared out to 2 processes of 2 parts each" in str(found[0])


def test_lp_warns_whose_neighbors_it_finds(images, tmp_path, caplog):
    distill(config(images, tmp_path, {"MAX_ITER": 1, "ACCUMULATE": 2}, METHODS=["lp"]))
    assert "lp finds a sample's neighbors among the 4 images that are computed together" in caplog.text
