"""Learning rates against torch's schedulers and by hand, clipping by hand; tests of detection compare Detectron2's."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from nst_det.distillation.config import get_defaults
from nst_det.engine.solver import clip_gradients, lr_schedule, set_learning_rate
from nst_det.errors import UserError


def solver(**values):
    node = get_defaults().SOLVER
    for key, value in values.items():
        node[key] = value
    return node


def rates(**values):
    node = solver(**values)
    schedule = lr_schedule(node)
    return [schedule(step) for step in range(node.MAX_ITER)]


@pytest.mark.parametrize(
    ("values", "scheduler"),
    [
        (
            {"LR_SCHEDULER_NAME": "OneCycleLR", "MAX_ITER": 50, "ONECYCLE_RISE": 0.2},
            lambda o: lr_scheduler.OneCycleLR(o, 1.0, 50, pct_start=0.2, cycle_momentum=False),
        ),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "MAX_ITER": 30}, lambda o: lr_scheduler.CosineAnnealingLR(o, 30)),
        (
            {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "MAX_ITER": 12, "STEPS": [4, 9], "GAMMA": 0.1},
            lambda o: lr_scheduler.MultiStepLR(o, [4, 9], gamma=0.1),
        ),
    ],
)
def test_schedules_are_torchs(values, scheduler):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs, wanted = scheduler(optimizer), []
    for _ in range(values["MAX_ITER"]):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(**values) == pytest.approx(wanted, abs=1e-9)


def test_steps_with_warmup_by_hand():
    found = rates(
        LR_SCHEDULER_NAME="WarmupMultiStepLR", MAX_ITER=20, STEPS=[10, 15], GAMMA=0.5, WARMUP_ITERS=4, WARMUP_FACTOR=0.2
    )
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 6 + [0.5] * 5 + [0.25] * 5)


def test_cosine_with_warmup_by_hand():
    def cosine(step):
        return 0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2

    found = rates(MAX_ITER=100, WARMUP_ITERS=10, WARMUP_FACTOR=0.001, BASE_LR=0.01, BASE_LR_END=0.001)
    # the line ends where the cosine then is
    assert found[:10] == pytest.approx([0.001 + (cosine(10) - 0.001) * step / 10 for step in range(10)])
    assert found[10:] == pytest.approx([cosine(step) for step in range(10, 100)])


@pytest.mark.parametrize(("steps", "wanted"), [(2, [0.3, 0.3, 1, 1]), (0, [1, 1, 1, 1]), (9, [0.3] * 4)])
def test_constant_warmup_by_hand(steps, wanted):
    values = {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "WARMUP_METHOD": "constant", "WARMUP_FACTOR": 0.3}
    assert rates(MAX_ITER=4, WARMUP_ITERS=steps, **values) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("SOLVER.STEPS", {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "STEPS": [3, 2]}),
        ("SOLVER.BASE_LR_END", {"BASE_LR_END": 1.0}),
    ],
)
def test_schedules_that_make_no_sense(key, values):
    with pytest.raises(UserError, match=key):
        lr_schedule(solver(**values))


def test_set_learning_rate_keeps_what_each_group_was_built_with():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": [second], "lr": 2.0}])
    for factor in (0.1, 1.0, 0.02):
        set_learning_rate(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5 * factor, 2.0 * factor])


@pytest.mark.parametrize(
    ("values", "first", "second"),
    [
        ({"ENABLED": False, "CLIP_VALUE": 1.0}, [3, 4], [0.3, -0.4]),
        ({"CLIP_TYPE": "value", "CLIP_VALUE": 0.35}, [0.35, 0.35], [0.3, -0.35]),
        # each parameter by its own norm
        ({"CLIP_TYPE": "norm", "CLIP_VALUE": 1.0}, [0.6, 0.8], [0.3, -0.4]),
        ({"CLIP_TYPE": "norm", "CLIP_VALUE": 3.5, "NORM_TYPE": 1.0}, [1.5, 2.0], [0.3, -0.4]),
        # all together: their norm is 5.02494
        ({"CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0}, [0.597022, 0.796030], [0.0597022, -0.0796030]),
        ({"CLIP_TYPE": "full_model", "CLIP_VALUE": 9.0}, [3, 4], [0.3, -0.4]),
        ({"CLIP_TYPE": "full_model", "CLIP_VALUE": 3.85, "NORM_TYPE": 1.0}, [1.5, 2.0], [0.15, -0.2]),
    ],
)
def test_clipping_by_hand(values, first, second):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, -0.4])
    node = solver().CLIP_GRADIENTS
    node.ENABLED = True
    for key, value in values.items():
        node[key] = value
    clip_gradients(parameters, node)
    assert parameters[0].grad.tolist() == pytest.approx(first, rel=1e-5)
    assert parameters[1].grad.tolist() == pytest.approx(second, rel=1e-5)
    assert parameters[2].grad is None
