import pytest
import torch
from torch import nn

from nst_det.detection.solver import build_optimizer, is_backbone
from nst_det.detection.torchvision import build_detector
from nst_det.engine.solver import clip_gradients, lr_schedule, set_learning_rate
from nst_det.errors import UserError


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
        set_learning_rate(optimizer, schedule(step))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for module in (layer, own):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 0.9)
        clip_gradients(own.parameters(), solver.CLIP_GRADIENTS)
        theirs.step()
        optimizer.step()
        scheduler.step()
    assert torch.allclose(layer.weight, own.weight, atol=1e-7)
