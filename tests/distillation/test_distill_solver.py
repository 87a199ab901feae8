"""Decay of parameter groups and a step of SGD, by hand."""

import pytest
import torch
from torch import nn

from nst_det.distillation.config import get_defaults
from nst_det.distillation.trainer import build_optimizer


def solver(**values):
    node = get_defaults().SOLVER
    for key, value in values.items():
        node[key] = value
    return node


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
