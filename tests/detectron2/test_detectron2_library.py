"""NST in somebody's own Detectron2 project: their model, their trainer class, their LazyConfig."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from nst_det.detectron2 import add_config, build_teacher, distill, register_voc
from nst_det.detectron2.data import build_train_loader
from nst_det.errors import UserError
from nst_det.losses import nst_loss
from nst_det.losses.loss_balance import STEPS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def cfg(configured):
    return configured()


def first_batch(cfg):
    return next(iter(build_train_loader(cfg)))


def test_the_added_loss_is_nst_on_the_fpn_maps(cfg, tiny_teacher):
    torch.manual_seed(0)
    student = build_model(cfg)
    teacher = build_teacher(*tiny_teacher, device="cpu")
    model = distill(student, teacher, "nst-poly:3", ["p2", "p4"]).train()
    batch = first_batch(cfg)
    with EventStorage():
        torch.manual_seed(1)
        losses = model(batch)
        torch.manual_seed(1)
        alone = student(batch)
    assert set(losses) - set(alone) == {"loss_transfer_nst-poly"}
    # the student is in training mode, so batch normalization gave the same maps in both calls
    for name, value in alone.items():
        torch.testing.assert_close(losses[name], value)
    with torch.no_grad():
        images = student.preprocess_image(batch).tensor
        mine, theirs = student.backbone(images), teacher.backbone(images)
        wanted = 3 * sum(nst_loss(mine[level], theirs[level]) for level in ("p2", "p4"))
    torch.testing.assert_close(losses["loss_transfer_nst-poly"], wanted, rtol=1e-4, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert model.state_dict().keys() == student.state_dict().keys()


def test_a_lazy_config_builds_it_and_simple_trainer_trains_it(cfg, tiny_teacher):
    lazy = LazyCall(distill)(
        student=LazyCall(build_model)(cfg=cfg),
        teacher=tiny_teacher[0],
        teacher_weights=tiny_teacher[1],
        method="at+nst-poly",
        levels=["p3", "res4"],
    )
    model = instantiate(lazy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = SimpleTrainer(model, build_train_loader(cfg), optimizer)
    before = {name: value.clone() for name, value in model.student.state_dict().items()}
    trainer.train(0, 1)
    moved = {name for name, value in model.student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"backbone.bottom_up.model.conv1.weight", "backbone.fpn_output3.weight"} <= moved


def test_levels_below_an_fpn_and_a_teacher_backbone_file(cfg):
    config, path = cfg.clone(), f"{cfg.OUTPUT_DIR}.yaml"
    config.defrost()
    config.MODEL.TIMM.ARCH = "resnet18"
    Path(path).write_text(config.dump())
    model = distill(build_model(cfg), path, "nst-poly", ["res3", "res4"], teacher_weights="backbone://r18").train()
    with EventStorage():
        assert float(model(first_batch(cfg))["loss_transfer_nst-poly"].detach()) > 0
    with pytest.raises(UserError, match="p3 would be random"):
        distill(build_model(cfg), path, "nst-poly", ["p3"], teacher_weights="backbone://r18")
    with pytest.raises(UserError, match="the teacher's box head would be random"):
        distill(build_model(cfg), path, "kd", ["res3"], teacher_weights="backbone://r18")


def test_warm_up_follows_the_iteration_of_the_storage(cfg, tiny_teacher):
    config, weights = tiny_teacher
    model = distill(build_model(cfg), config, "nst-poly", ["p3"], teacher_weights=weights, warmup_iters=4).train()
    batch = first_batch(cfg)
    values = []
    for iteration in (0, 1, 3, 9):
        with EventStorage(iteration), torch.no_grad():
            values.append(float(model(batch)["loss_transfer_nst-poly"]))
    full = values[-1]
    assert values == pytest.approx([full / 4, full / 2, full, full], rel=1e-3)


def test_kd_and_auto_weight_in_three_lines(cfg, tiny_teacher):
    given = {"method": "kd+nst-poly", "levels": ["p3"], "auto_weight": {"nst-poly": 0.3}}
    model = distill(build_model(cfg), tiny_teacher[0], teacher_weights=tiny_teacher[1], **given).train()
    batch = first_batch(cfg)
    for iteration in range(STEPS):
        with EventStorage(iteration):
            losses = model(batch)
    assert losses["loss_transfer_kd"] > 0
    kd, nst = model.transfer.balance.lines
    assert (kd.weight, nst.ratio) == (1.0, pytest.approx(0.3))
    assert model.transfer.terms["kd"]["logits"].temperature == 1.0
    # what add_checkpointable("adapters", model.transfer) keeps
    again = distill(build_model(cfg), tiny_teacher[0], teacher_weights=tiny_teacher[1], **given)
    again.transfer.load_state_dict(model.transfer.state_dict())
    assert again.transfer.weights == model.transfer.weights


def test_options_that_are_left_out_keep_their_default(cfg, tiny_teacher):
    student, given = build_model(cfg), {"teacher_weights": tiny_teacher[1], "options": {"dkd": {"temperature": 2.0}}}
    term = distill(student, tiny_teacher[0], "dkd", ["p3"], **given).transfer.terms["dkd"]["logits"]
    assert (term.temperature, term.others) == (2.0, 0.25)


def test_a_teachers_paths_are_beside_its_yaml(tiny_teacher, voc_root, tmp_path):
    shutil.copy(tiny_teacher[1], tmp_path / "here.pth")
    data = f"DATASETS: {{VOC: {{tiny_train: {{ROOT: [./nowhere, {voc_root}]}}}}}}"
    (tmp_path / "own.yaml").write_text(f"_BASE_: {tiny_teacher[0]}\nMODEL: {{WEIGHTS: ./here.pth}}\n{data}\n")
    assert build_teacher(str(tmp_path / "own.yaml")).roi_heads.num_classes == 2


def test_backbones_have_names_once_a_config_has_our_keys():
    code = (
        "from nst_det.detectron2 import add_config; from detectron2.utils.file_io import PathManager; "
        "print(PathManager.get_local_path('backbone://small'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("small.pth")


def test_any_detectron2_config_teaches(cfg, tmp_path):
    # a config of Detectron2's own, its ResNet, BGR pixels and all; the weights are random but saved
    own = get_cfg()
    own.MODEL.DEVICE, own.MODEL.RESNETS.DEPTH, own.MODEL.RESNETS.RES2_OUT_CHANNELS = "cpu", 18, 64
    own.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    own.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    own.MODEL.FPN.IN_FEATURES, own.MODEL.FPN.OUT_CHANNELS = ["res2", "res3", "res4", "res5"], 32
    own.MODEL.RPN.IN_FEATURES = own.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    own.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256]]
    own.MODEL.ROI_HEADS.NAME, own.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
    own.MODEL.ROI_BOX_HEAD.NUM_FC, own.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 16
    (tmp_path / "own.yaml").write_text(own.dump())
    torch.save({"model": build_model(own).state_dict()}, tmp_path / "own.pth")
    student = build_model(cfg)
    model = distill(student, str(tmp_path / "own.yaml"), teacher_weights=str(tmp_path / "own.pth")).train()
    batch = first_batch(cfg)
    with EventStorage(), torch.no_grad():
        got = model(batch)["loss_transfer_nst-poly"]
        # the teacher sees what its own preprocessing would give it: BGR, its mean, std 1
        theirs = [{"image": item["image"].flip(0)} for item in batch]
        pixels = model.teacher.preprocess_image(theirs).tensor
        student_maps = student.backbone(student.preprocess_image(batch).tensor)
        wanted = 50 * sum(
            nst_loss(student_maps[level], model.teacher.backbone(pixels)[level]) for level in ("p2", "p3", "p4", "p5")
        )
    weight = model.transfer.weights["nst-poly"]
    torch.testing.assert_close(got, wanted / 50 * weight, rtol=1e-4, atol=1e-7)


def test_a_teacher_whose_weights_are_not_whole(cfg, tiny_teacher, tmp_path):
    part = {key: value for key, value in torch.load(tiny_teacher[1])["model"].items() if "fpn_" not in key}
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="part.pth: .*fpn_"):
        distill(build_model(cfg), tiny_teacher[0], teacher_weights=str(tmp_path / "part.pth"))


def test_the_example_trains(tiny_yaml, tiny_teacher, voc_root, tmp_path, monkeypatch):
    for split in ("train", "test"):
        register_voc(f"tiny_{split}", voc_root, split)
    # the example's config is plain Detectron2's: the number of classes is said
    words = ["--config-file", tiny_yaml, "--teacher", tiny_teacher[0], "--teacher-weights", tiny_teacher[1]]
    opts = ["OUTPUT_DIR", tmp_path, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"]
    monkeypatch.setattr("sys.argv", ["detectron2_own_trainer.py", *map(str, words), *map(str, opts)])
    runpy.run_path(str(EXAMPLES / "detectron2_own_trainer.py"), run_name="__main__")
    events = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert events[-1]["loss_transfer_nst-poly"] > 0
    # the checkpoint is the student's alone
    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(tiny_yaml))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    checkpointer, seen = DetectionCheckpointer(build_model(cfg)), []
    checkpointer._log_incompatible_keys = seen.append
    checkpointer.load(str(tmp_path / "model_final.pth"))
    assert (seen[0].missing_keys, seen[0].unexpected_keys) == ([], [])
