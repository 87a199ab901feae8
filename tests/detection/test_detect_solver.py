import math

import pytest
import torch
from torch import nn

from nst_det.detection.solver import build_optimizer, clip_gradients, is_backbone, lr_schedule, set_learning_rate
from nst_det.detection.torchvision import build_detector
from nst_det.errors import UserError


def rates(solver):
    schedule = lr_schedule(solver)
    return [schedule(step / solver.MAX_ITER) for step in range(solver.MAX_ITER)]


def test_steps_with_warmup_by_hand(small):
    solver = small(
        {
            "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER.MAX_ITER": 20, "SOLVER.STEPS": [10, 15],
            "SOLVER.GAMMA": 0.5, "SOLVER.WARMUP_ITERS": 4, "SOLVER.WARMUP_FACTOR": 0.2,
        }
    ).SOLVER  # fmt: skip
    expected = [0.2, 0.4, 0.6, 0.8] + [1.0] * 6 + [0.5] * 5 + [0.25] * 5
    assert rates(solver) == pytest.approx(expected)


def test_cosine_with_warmup_by_hand(small):
    solver = small(
        {
            "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.MAX_ITER": 100, "SOLVER.WARMUP_ITERS": 10,
            "SOLVER.WARMUP_FACTOR": 0.001, "SOLVER.BASE_LR": 0.01, "SOLVER.BASE_LR_END": 0.001,
        }
    ).SOLVER  # fmt: skip

    def cosine(step):
        return 0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2

    found = rates(solver)
    # the line ends where the cosine then is
    assert found[:10] == pytest.approx([0.001 + (cosine(10) - 0.001) * step / 10 for step in range(10)])
    assert found[10:] == pytest.approx([cosine(step) for step in range(10, 100)])


def test_constant_warmup_and_none(small):
    values = {"SOLVER.MAX_ITER": 4, "SOLVER.STEPS": [], "SOLVER.WARMUP_METHOD": "constant", "SOLVER.WARMUP_FACTOR": 0.3}
    assert rates(small({**values, "SOLVER.WARMUP_ITERS": 2}).SOLVER) == pytest.approx([0.3, 0.3, 1, 1])
    assert rates(small({**values, "SOLVER.WARMUP_ITERS": 0}).SOLVER) == pytest.approx([1, 1, 1, 1])
    assert rates(small({**values, "SOLVER.WARMUP_ITERS": 9}).SOLVER) == pytest.approx([0.3] * 4)


def test_steps_that_dont_rise_and_a_wrong_end(small):
    with pytest.raises(UserError, match=r"SOLVER.STEPS: \[3, 2\] must rise"):
        lr_schedule(small({"SOLVER.STEPS": [3, 2]}).SOLVER)
    with pytest.raises(UserError, match="BASE_LR_END is 1.0"):
        lr_schedule(small({"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR_END": 1.0}).SOLVER)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backbone.bottom_up.model.conv1.weight", True),
        ("student.backbone.bottom_up.model.conv1.weight", True),
        ("backbone.model.conv1.weight", True),
        ("backbone.fpn_lateral2.weight", False),
        ("roi_heads.box_head.fc1.weight", False),
        ("transfer.terms.fitnet.weight", False),
    ],
)
def test_is_backbone(name, expected):
    assert is_backbone(name) is expected


def by_parameter(optimizer):
    return {
        id(p): (pytest.approx(group["lr"]), pytest.approx(group["weight_decay"]))
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_rates_and_decays(small):
    config = small(
        {
            "SOLVER.BASE_LR": 0.1, "SOLVER.BACKBONE_MULTIPLIER": 0.5, "SOLVER.WEIGHT_DECAY": 0.01,
            "SOLVER.WEIGHT_DECAY_NORM": 0.002, "SOLVER.WEIGHT_DECAY_BIAS": 0.003, "SOLVER.BIAS_LR_FACTOR": 2.0,
        }
    )  # fmt: skip
    detector = build_detector(config)
    groups = by_parameter(build_optimizer(detector, config.SOLVER))
    named = dict(detector.named_parameters())
    for name, expected in {
        "backbone.bottom_up.model.conv1.weight": (0.05, 0.01),
        "backbone.bottom_up.model.bn1.weight": (0.05, 0.002),
        "backbone.bottom_up.model.bn1.bias": (0.2, 0.003),
        "backbone.fpn_output2.weight": (0.1, 0.01),
        "roi_heads.box_head.fc1.bias": (0.2, 0.003),
    }.items():
        assert groups[id(named[name])] == expected, name
    assert len(groups) == len(named)


def test_frozen_parameters_are_left_out(small):
    detector = build_detector(small())
    detector.backbone.requires_grad_(False)
    groups = by_parameter(build_optimizer(detector, small().SOLVER))
    assert len(groups) == sum(parameter.requires_grad for parameter in detector.parameters())
    with pytest.raises(UserError, match="every parameter is frozen"):
        build_optimizer(detector.requires_grad_(False), small().SOLVER)


@pytest.mark.parametrize("kind", ["SGD", "ADAMW"])
def test_the_learning_rate_that_is_set_is_the_one_that_is_used(small, kind):
    layer = nn.Linear(1, 1, bias=False)
    solver = small({"SOLVER.OPTIMIZER": kind, "SOLVER.BASE_LR": 0.5, "SOLVER.WEIGHT_DECAY": 0.0}).SOLVER
    optimizer = build_optimizer(layer, solver)
    for factor in (0.1, 1.0, 0.02):
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.5 * factor)]
    before = layer.weight.item()
    layer.weight.grad = torch.ones(1, 1)
    optimizer.step()
    # the first step of both is the rate, up to Adam's epsilon
    assert before - layer.weight.item() == pytest.approx(0.01, rel=1e-3)


def test_clipping(small):
    def clipped(kind, value):
        node = small(
            {"SOLVER.CLIP_GRADIENTS.ENABLED": kind != "off", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": value}
            | ({"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": kind} if kind != "off" else {})
        ).SOLVER.CLIP_GRADIENTS
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, -0.4])
        clip_gradients(parameters, node)
        return [parameter.grad.tolist() for parameter in parameters[:2]]

    assert clipped("off", 1.0) == [[3, 4], pytest.approx([0.3, -0.4])]
    # each parameter by its own norm
    assert clipped("norm", 1.0) == [pytest.approx([0.6, 0.8]), pytest.approx([0.3, -0.4])]
    assert clipped("value", 0.35) == [pytest.approx([0.35, 0.35]), pytest.approx([0.3, -0.35])]


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "changes",
    [
        {"SOLVER.STEPS": [20, 30, 60], "SOLVER.GAMMA": 0.3, "SOLVER.WARMUP_FACTOR": 0.1},
        {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR_END": 0.0001},
        {
            "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
            "SOLVER.RESCALE_INTERVAL": True,
            "SOLVER.WARMUP_METHOD": "constant",
        },
    ],
)
def test_schedules_and_groups_are_detectron2s(small, changes):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.solver import build_lr_scheduler
    from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

    config = small(
        {
            "SOLVER.OPTIMIZER": "SGD", "SOLVER.MAX_ITER": 50, "SOLVER.WARMUP_ITERS": 7,
            "SOLVER.WEIGHT_DECAY_BIAS": 0.003, "SOLVER.BIAS_LR_FACTOR": 2.0, "SOLVER.CLIP_GRADIENTS.ENABLED": True,
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm", **changes,
        }
    )  # fmt: skip
    solver = config.SOLVER
    detector = build_detector(config)
    ours = build_optimizer(detector, solver)
    groups = get_default_optimizer_params(
        detector,
        solver.BASE_LR,
        solver.WEIGHT_DECAY,
        solver.WEIGHT_DECAY_NORM,
        solver.BIAS_LR_FACTOR,
        solver.WEIGHT_DECAY_BIAS,
    )
    assert by_parameter(ours) == by_parameter(torch.optim.SGD(groups))
    layer = nn.Linear(3, 2)
    theirs = maybe_add_gradient_clipping(config, torch.optim.SGD(layer.parameters(), lr=solver.BASE_LR))
    scheduler = build_lr_scheduler(config, theirs)
    schedule, own = lr_schedule(solver), nn.Linear(3, 2)
    own.load_state_dict(layer.state_dict())
    optimizer = torch.optim.SGD(own.parameters(), lr=solver.BASE_LR)
    for step in range(50):
        set_learning_rate(optimizer, schedule(step / 50))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for module in (layer, own):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 0.9)
        clip_gradients(own.parameters(), solver.CLIP_GRADIENTS)
        theirs.step()
        optimizer.step()
        scheduler.step()
    assert torch.allclose(layer.weight, own.weight, atol=1e-7)
