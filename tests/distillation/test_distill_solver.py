import pytest
import torch
from torch import nn

from nst_det.distillation.config import get_defaults
from nst_det.distillation.solver import build_optimizer, clip_gradients, lr_factor


def solver(**values):
    node = get_defaults().SOLVER
    for key, value in values.items():
        node[key] = value
    return node


def rates(scheduler_of, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_one_cycle_is_torchs():
    wanted = rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 50, pct_start=0.2, cycle_momentum=False), 50)
    node = solver(SCHEDULE="onecycle", MAX_ITER=50, ONECYCLE_RISE=0.2)
    assert [lr_factor(step, node) for step in range(50)] == pytest.approx(wanted, abs=1e-12)


def test_cosine_is_torchs():
    wanted = rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30), 30)
    node = solver(SCHEDULE="cosine", MAX_ITER=30)
    assert [lr_factor(step, node) for step in range(30)] == pytest.approx(wanted, abs=1e-9)


def test_steps_are_torchs():
    wanted = rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4, 9], gamma=0.1), 12)
    node = solver(SCHEDULE="step", MAX_ITER=12, STEPS=[4, 9], GAMMA=0.1)
    assert [lr_factor(step, node) for step in range(12)] == pytest.approx(wanted, abs=1e-12)


def test_warm_up_is_linear_and_under_the_schedule():
    node = solver(SCHEDULE="constant", MAX_ITER=20, WARMUP_ITERS=10, WARMUP_FACTOR=0.1)
    assert [lr_factor(step, node) for step in (0, 5, 10, 19)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    node = solver(SCHEDULE="cosine", MAX_ITER=20, WARMUP_ITERS=10, WARMUP_FACTOR=0.1)
    assert lr_factor(10, node) == pytest.approx(0.5)
    assert lr_factor(5, node) == pytest.approx(0.55 * 0.8535533905932737)


@pytest.mark.parametrize("name", ["SGD", "ADAMW"])
def test_scales_shifts_and_biases_have_their_own_decay(name):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network[0].bias.requires_grad_(False)
    optimizer = build_optimizer([network], solver(OPTIMIZER=name, WEIGHT_DECAY=0.5, WEIGHT_DECAY_NORM=0.25))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(network[0].weight): 0.5, id(network[1].weight): 0.25, id(network[1].bias): 0.25}


def test_sgd_step_by_hand():
    parameter = nn.Parameter(torch.full((1, 1), 2.0))
    holder = nn.Module()
    holder.weight = parameter
    node = solver(OPTIMIZER="SGD", BASE_LR=0.1, MOMENTUM=0.9, NESTEROV=True, WEIGHT_DECAY=0.5)
    optimizer = build_optimizer([holder], node)
    parameter.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    # g = 3 + 0.5 * 2 = 4, buffer 4, step g + 0.9 * 4 = 7.6
    assert parameter.item() == pytest.approx(2.0 - 0.1 * 7.6)


def test_clipping_scales_all_gradients_together():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_gradients([first, second], 0.0)
    assert (first.grad.item(), second.grad.item()) == (3.0, 4.0)
    clip_gradients([first, second], 1.0)
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-5)
