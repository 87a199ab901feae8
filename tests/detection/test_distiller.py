import copy
import logging

import pytest
import torch
from fvcore.common.config import CfgNode

from nst_det.detection.distiller import (
    distill,
    take_same_pixels,
    translate_pixels,
    wants_teacher,
)
from nst_det.detection.solver import build_optimizer
from nst_det.detection.torchvision import build_detector
from nst_det.engine.keys import TRANSFER_KEYS, config_tree
from nst_det.errors import UserError
from nst_det.losses import nst_loss
from tests.helpers.detection import step

LEVELS = ["p2", "p3", "p4"]


def node(method="nst-poly:7", levels=LEVELS, **values):
    made = config_tree(TRANSFER_KEYS)
    made.LEVELS = levels
    made.update(values)
    return method, made


@pytest.fixture
def teacher(small):
    return build_detector(small({"MODEL.TIMM.ARCH": "nst_resnet18_w48", "MODEL.FPN.OUT_CHANNELS": 24}), seed=8)


def test_terms_join_the_students_losses_with_their_values(talkative, teacher, batch):
    student = talkative().train()
    alone = copy.deepcopy(student)
    losses = step(distill(student, teacher, *node()).train(), batch)
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_transfer_nst-poly"]
    plain = step(alone, batch)
    assert all(torch.equal(losses[name], plain[name]) for name in plain)
    pixels, _ = alone.preprocess([item["image"] for item in batch])
    again = talkative().train()
    with torch.no_grad():
        ours, theirs = again.backbone(pixels), teacher.eval().backbone(pixels)
    expected = 7 * sum(float(nst_loss(ours[level], theirs[level])) for level in LEVELS)
    assert float(losses["loss_transfer_nst-poly"].detach()) == pytest.approx(expected, rel=1e-4)


def test_gradients_reach_the_student_alone(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node()).train()
    before = copy.deepcopy(teacher.state_dict())
    step(model, batch)["loss_transfer_nst-poly"].backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert "student.backbone.fpn_output2.weight" in with_gradient
    assert "student.backbone.bottom_up.model.conv1.weight" in with_gradient
    assert not any("roi_heads" in name or "proposal_generator" in name for name in with_gradient)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training


def test_only_the_student_is_saved_and_only_it_and_adapters_are_trained(talkative, teacher, small):
    student = talkative()
    model = distill(student, teacher, *node("fitnet+nst-poly"))
    assert list(model.state_dict()) == list(student.state_dict())
    adapters = model.transfer.state_dict()
    assert len(adapters) > 0
    trained = {id(p) for group in build_optimizer(model, small().SOLVER).param_groups for p in group["params"]}
    assert trained == {id(p) for p in (*student.parameters(), *model.transfer.parameters())}
    other = talkative()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert model.load_state_dict(other.state_dict()).missing_keys == []
    assert not student.roi_heads.box_head.fc1.weight.any()
    # inside another module too
    assert list(torch.nn.Sequential(model).state_dict(prefix="x.")) == [f"x.0.{name}" for name in student.state_dict()]


def test_inference_is_the_students_and_asks_no_teacher(talkative, teacher, batch):
    student = talkative()
    alone = copy.deepcopy(student).eval()
    model = distill(student, teacher, *node())
    asked = []
    teacher.backbone.register_forward_hook(lambda *_: asked.append(True))
    model(batch)
    assert len(asked) == 1
    alone.load_state_dict(student.state_dict())
    # the student alone may be put into evaluation mode
    for module in (model.student, model):
        module.eval()
        with torch.no_grad():
            for found, expected in zip(module(batch), alone(batch)):
                assert torch.equal(found["boxes"], expected["boxes"])
    assert len(asked) == 1


def test_levels_below_the_pyramid(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node(levels=["res3", "p4", "res4:res3"])).train()
    losses = step(model, batch)
    assert losses["loss_transfer_nst-poly"] > 0
    # a teacher's pyramid that no term looks at is not computed
    seen = []
    teacher.backbone.fpn_output2.register_forward_hook(lambda *_: seen.append(True))
    step(model, batch)
    assert seen == [True]
    step(distill(talkative(), teacher, *node(levels=["res3"])).train(), batch)
    assert seen == [True]


def test_the_weight_warms_up(talkative, teacher, batch):
    models = [distill(talkative(), teacher, *node(WARMUP_ITERS=warmup)).train() for warmup in (0, 4)]
    for iteration in range(5):
        full, part = (step(model, batch)["loss_transfer_nst-poly"].detach() for model in models)
        assert float(part) == pytest.approx(float(full) * min((iteration + 1) / 4, 1), rel=1e-6)
    models[1].iteration = 1
    part = step(models[1], batch)["loss_transfer_nst-poly"].detach()
    assert float(part) == pytest.approx(float(step(models[0], batch)["loss_transfer_nst-poly"].detach()) / 2, rel=1e-6)


def test_a_teacher_with_other_pixels_sees_what_it_was_trained_on(small, batch):
    bgr = {
        "INPUT.FORMAT": "BGR", "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675], "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]
    }  # fmt: skip
    student, teacher = build_detector(small(), 0), build_detector(small(bgr), 1)
    ours, sizes = student.preprocess([item["image"] for item in batch])
    theirs, _ = teacher.preprocess([item["image"].flip(0) for item in batch])
    assert torch.allclose(translate_pixels(ours, student, teacher, sizes), theirs, atol=1e-4)
    assert take_same_pixels(student, build_detector(small(), 2))
    assert not take_same_pixels(student, teacher)
    # and back
    assert torch.allclose(translate_pixels(theirs, teacher, student, sizes), ours, atol=1e-5)


def test_the_teacher_computes_where_and_how_the_student_does(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node()).train()
    model.student.amp = torch.bfloat16
    seen = []
    teacher.backbone.fpn_output2.register_forward_hook(lambda _module, _inputs, map_: seen.append(map_.dtype))
    assert step(model, batch)["loss_transfer_nst-poly"].dtype == torch.float32
    assert seen == [torch.bfloat16]
    model.to(torch.float64)
    assert next(teacher.parameters()).dtype == torch.float64
    assert not model.train().teacher.training


def test_a_student_without_padding_and_a_teacher_that_needs_it(talkative, teacher, batch):
    alone = {
        "MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.TIMM.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"], "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32]],
    }  # fmt: skip
    model = distill(talkative(alone), teacher, *node(levels=["res4:p4"])).train()
    assert step(model, [batch[1]])["loss_transfer_nst-poly"].isfinite()


def test_shapes_are_logged_once(talkative, teacher, batch, caplog):
    caplog.set_level(logging.INFO)
    model = distill(talkative(), teacher, *node("kd+nst-poly", ["p4", "res3:p4"])).train()
    step(model, batch)
    step(model, batch)
    (table,) = [text for text in caplog.messages if text.startswith("compared at 96 x 96 pixels")]
    assert [" ".join(line.split()) for line in table.splitlines()[3:]] == [
        "kd logits: 4 logits: 4 none",
        "nst-poly p4: 16 x 6 x 6, stride 16 p4: 24 x 6 x 6, stride 16 none",
        "nst-poly res3: 64 x 12 x 12, stride 8 p4: 24 x 6 x 6, stride 16 student averaged down to 6 x 6",
    ]


def norm_at(student, loss):
    student.zero_grad()
    loss.backward(retain_graph=True)
    found = [parameter.grad for parameter in student.backbone.parameters() if parameter.grad is not None]
    return float(sum(gradient.double().square().sum() for gradient in found).sqrt())


def test_the_terms_are_measured_against_the_detectors_own_losses(talkative, teacher, batch, caplog):
    caplog.set_level(logging.INFO)
    model = distill(talkative(), teacher, *node("kd+nst-poly", WEIGHTS={"kd": 1e-6})).train()
    losses = step(model, batch)
    task = norm_at(model.student, sum(value for name, value in losses.items() if "transfer" not in name))
    for line in model.transfer.balance.lines:
        assert line.norm == pytest.approx(norm_at(model.student, losses[f"loss_transfer_{line.term}"]), rel=1e-4)
        assert line.ratio == pytest.approx(line.norm / task, rel=1e-4)
    # a table, and a warning for each one-sided term; once
    step(model, batch)
    assert [text.partition(" ")[0] for text in caplog.messages[1:]] == ["terms", "the", "the"]
    assert [record.levelname for record in caplog.records[2:]] == ["WARNING", "WARNING"]


def test_auto_weight_gives_a_term_its_share(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node("kd+nst-poly", AUTO_WEIGHT={"kd": 0.5, "nst-poly": 0.25})).train()
    for _ in range(6):
        losses = step(model, batch)
    task = norm_at(model.student, sum(value for name, value in losses.items() if "transfer" not in name))
    for name, share in (("kd", 0.5), ("nst-poly", 0.25)):
        # the same batch, weights and draws in each step
        assert norm_at(model.student, losses[f"loss_transfer_{name}"]) == pytest.approx(share * task, rel=1e-3)


@pytest.mark.parametrize(
    ("transfer", "named"),
    [
        (node("nst-poly", ["p9"]), r"TRANSFER: nst-poly: the student has no level 'p9'; it has res2, "),
        (node("nst-poly", []), "TRANSFER: nst-poly"),
        (node("nst-poly", ["p3:p9"]), r"TRANSFER: nst-poly: the teacher has no level 'p9'; it has res2, .*, p6"),
        (node("pkd", ["p3"]), "TRANSFER: pkd .*p3 has 16 in the student and 24"),
        (node("nst-pol"), "unknown term 'nst-pol'"),
    ],
)
def test_methods_that_cant_be_built_are_one_line(talkative, teacher, transfer, named):
    with pytest.raises(UserError, match=named):
        distill(talkative(), teacher, *transfer)


def test_detectors_that_cant_be_compared(talkative, teacher, batch):
    with pytest.raises(UserError, match="Linear has no backbone"):
        distill(torch.nn.Linear(1, 1), teacher, *node())
    model = distill(talkative(), teacher, *node("kd", AUTO_WEIGHT={"kd": 1.0})).train()
    model.student.backbone.requires_grad_(False)
    with pytest.raises(UserError, match=r"TRANSFER.AUTO_WEIGHT"):
        step(model, batch)
    step(distill(model.student, teacher, *node("kd")).train(), batch)
    model = distill(talkative(), teacher, *node("kd")).train()
    model.student.roi_heads.forward = lambda *_: {}
    with pytest.raises(RuntimeError, match="didn't call its box head"):
        step(model, batch)
    model.student.forward = lambda _batch: {}
    with pytest.raises(RuntimeError, match=r"didn't call student\.backbone"):
        model(batch)


def test_wants_teacher():
    def config(method, file=""):
        return CfgNode({"METHOD": method, "TEACHER": {"CONFIG_FILE": file, "WEIGHTS": ""}})

    assert not wants_teacher(config("ce"))
    assert wants_teacher(config("nst-poly", "a.yaml"))
    for method, named in (("nst-poly", "TEACHER.CONFIG_FILE"), ("nst-cubic", "METHOD")):
        with pytest.raises(UserError, match=named):
            wants_teacher(config(method))
