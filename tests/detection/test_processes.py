"""Stage two in two processes of gloo's against one with the same batch."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from nst_det.detection import trainer as module
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.data import data_classes
from nst_det.detection.pipeline import train_detector
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.rpn import RpnHead
from nst_det.engine.checkpoint import checkpoints
from nst_det.engine.distributed import rank
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import read_step
from nst_det.engine.signals import Preempted
from nst_det.engine.train_state import AveragedWeights, OptimizedState
from tests.helpers.detection import same_bits

# batch normalization over both processes; images of several sizes, so that a batch is padded
CHANGES = {
    "MODEL.TIMM.NORM": "SyncBN",
    "INPUT.MIN_SIZE_TRAIN": [64, 96],
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.BASE_LR": 0.0002,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.CHECKPOINT_PERIOD": 100,
    "SOLVER.MAX_ITER": 20,
    "TEST.EVAL_PERIOD": 10,
    # all proposals are trained on: among those of almost one score the last bit would choose.  Anchors are drawn.
    "MODEL.RPN.IN_FEATURES": ["p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[48], [72], [96]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.NMS_THRESH": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}


@pytest.fixture
def taught(untrained_teacher):
    """Keys of a student that a wider teacher teaches."""
    wide = {"MODEL.TIMM.ARCH": "nst_resnet10_w32", "MODEL.FPN.OUT_CHANNELS": 24}
    return {"METHOD": "fitnet:0.1+nst-poly:0.1", "TRANSFER.LEVELS": ["p3"], **untrained_teacher(wide)}


def test_two_processes_train_as_one(on_shapes, tmp_path, taught, in_processes):
    changes = CHANGES | taught
    alone = train_detector(on_shapes("one", changes))
    first, second = in_processes(train_detector, on_shapes("two", changes))
    assert first == second
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in two] == list(range(20))
    for mine, shared in zip(one, two, strict=True):
        assert {"loss_transfer_fitnet", "loss_transfer_nst-poly"} < shared.keys()
        # the losses add up to about 2
        assert shared == pytest.approx(mine, rel=1e-5, abs=2e-6)
    for name in ("map", "map_area", "per_class", "coco"):
        assert first[name] == pytest.approx(alone[name], abs=1e-6), name
    found = [json.loads((tmp_path / name / "detections.json").read_text()) for name in ("one", "two")]
    assert [record["image_id"] for record in found[0]] == [record["image_id"] for record in found[1]]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    begun = build_detector(on_shapes("x", changes | {"MODEL.ROI_HEADS.NUM_CLASSES": 8}), 0).state_dict()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=2e-5, msg=name)
        if name.startswith("roi_heads.box_head") and name.endswith("weight"):
            assert (value - begun[name]).abs().max() > 1e-4, f"{name} was not trained"


def test_a_batch_moves_to_a_gpu_as_without_processes(monkeypatch):
    made = []
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "DistributedDataParallel", lambda model, **words: made.append(words))
    module.data_parallel(torch.nn.Linear(1, 1, device="meta"))
    assert "device_ids" not in made[0]


def trained(config):
    """The result, and the average of the weights in this process after the last step."""
    kept, update = {}, AveragedWeights.update

    def updating(self):
        update(self)
        kept.update({name: value.clone() for name, value in self.network.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AveragedWeights, "update", updating)
        return train_detector(config), kept


def test_two_processes_go_on_with_the_same_bits(on_shapes, tmp_path, in_processes, stops_after_saving):
    # normalization of its own in each process, an average of the weights, validation, and the best of them
    changes = {"MODEL.TIMM.NORM": "BN", "DATASETS.VAL_FRACTION": 0.3, "TEST.EVAL_PERIOD": 2, "TEST.SELECT": "best"}
    changes["SOLVER.EMA_DECAY"] = 0.5
    (undisturbed, kept), (_, other) = in_processes(trained, on_shapes("one", changes))
    assert kept
    assert same_bits(other, kept)
    with stops_after_saving(3):
        (stopped,) = in_processes(train_detector, on_shapes("two", changes))
        assert str(stopped) == "stopped"
    assert not (tmp_path / "two" / "result.json").exists()
    gone_on = in_processes(train_detector, on_shapes("two", changes))[0]
    for name in ("map", "losses", "validation", "checkpoints"):
        assert gone_on[name] == undisturbed[name]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert same_bits(*weights)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert one == two


def test_parts_of_a_batch_add_up_to_it(on_shapes, tmp_path):
    """The sums of losses and gradients, where nothing is normalized over a part."""
    frozen = {
        **CHANGES,
        "MODEL.TIMM.NORM": "FrozenBN",
        "INPUT.MIN_SIZE_TRAIN": [96],
        "INPUT.RANDOM_FLIP": "none",
        "SOLVER.MAX_ITER": 3,
        "DATASETS.TEST": [],
        "TEST.EVAL_PERIOD": 0,
        # every image has as many RoIs: all that the box head's mean is taken over
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    }
    config = on_shapes("start", {"MODEL.ROI_HEADS.NUM_CLASSES": 8})
    save_weights(tmp_path / "start.safetensors", build_detector(config, 3), data_classes(config))
    for name, parts in (("whole", 1), ("parts", 2)):
        changes = {**frozen, "MODEL.WEIGHTS": str(tmp_path / "start.safetensors"), "SOLVER.ACCUMULATE": parts}
        train_detector(on_shapes(name, changes))
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert len(whole) == 3
    for mine, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(mine, rel=1e-5, abs=1e-7)


def stopped(config):
    with pytest.raises(Preempted) as left:
        train_detector(config)
    return left.value.signum


@pytest.fixture(params=[False, True], ids=["", "unread"])
def unread(request, monkeypatch):
    """Whether processes learn a step later how a step ended, as on GPUs."""
    if request.param:
        monkeypatch.setattr(OptimizedState, "waits", property(lambda self: self.suspect == self.step))
    return request.param


def test_a_signal_to_one_process_stops_all_after_the_same_step(on_shapes, tmp_path, in_processes, monkeypatch, unread):
    step = module.Trainer.run_step

    def signalled(self):
        if self.iter == 2 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    monkeypatch.setattr(module.Trainer, "run_step", signalled)
    config = on_shapes("run", {"SOLVER.CHECKPOINT_PERIOD": 100, "DATASETS.TEST": []})
    assert in_processes(stopped, config) == [signal.SIGTERM, signal.SIGTERM]
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-0000000{3 + unread}.pt"]


def test_proposals_that_are_no_number_in_one_process_are_met_by_all(
    on_shapes, tmp_path, in_processes, monkeypatch, unread
):
    forward, backward, now = RpnHead.forward, module.Trainer.backward, {}

    def noted(self, batch):
        now["step"] = self.iter
        return backward(self, batch)

    def poisoned(self, levels):
        logits, deltas = forward(self, levels)
        if self.training and now["step"] == 2 and rank() == 1:
            logits = [level * math.nan for level in logits]
        return logits, deltas

    monkeypatch.setattr(module.Trainer, "backward", noted)
    monkeypatch.setattr(RpnHead, "forward", poisoned)
    changes = {"SOLVER.NON_FINITE.POLICY": "skip", "DATASETS.TEST": []}
    results = in_processes(train_detector, on_shapes("run", changes))
    assert results[0] == results[1]
    content = read_step(tmp_path / "run" / "nonfinite" / "step-00000002.pt")
    assert content["not_finite"][0].startswith("the RPN's proposals, which are not finite on p2")
    assert content["rank"] == 1
    assert [item["image_id"] for item in content["batch"]] == content["images"]
