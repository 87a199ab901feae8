"""Casts, counters and copies by lists have the bits of those made one by one."""

import copy

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from nst_det.engine.foreach import copy_together, counted_together, weights_in


class Network(nn.Module):
    """Layers that are cast, one of them twice in a pass, one frozen; and a subclass that autocast alone may cast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(8), BatchNormAct2d(8)
        self.cumulative, self.unused = nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8)
        self.frozen, self.own, self.last = nn.Conv2d(8, 8, 1).requires_grad_(False), _Doubled(8, 8, 1), nn.Linear(8, 2)
        self.tied = nn.Conv2d(8, 8, 1, bias=False)
        self.tied.weight = self.twice.weight

    def forward(self, images):
        maps = self.tied(self.act(self.twice(self.norm(self.twice(self.first(images))))))
        return self.last(self.own(self.frozen(self.norm(self.cumulative(maps)))).mean((2, 3)))


class _Doubled(nn.Conv2d):
    def forward(self, maps):
        return self._conv_forward(maps, 2 * self.weight, self.bias)


def one_pass(model, together):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        if together:
            with weights_in(model, torch.bfloat16), counted_together(model):
                found = model(images)
        else:
            found = model(images)
    found.float().square().mean().backward()
    return found


def test_a_pass_has_the_bits_of_autocasts_own():
    plain = Network()
    together = copy.deepcopy(plain)
    for _ in range(2):
        assert torch.equal(one_pass(plain, False), one_pass(together, True))
    for (name, one), (_, other) in zip(plain.named_parameters(), together.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) == (name.startswith(("frozen", "unused"))), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name
    for (name, one), (_, other) in zip(plain.named_buffers(), together.named_buffers(), strict=True):
        assert torch.equal(one, other), name
    counts = [int(getattr(together, name).num_batches_tracked) for name in ("norm", "act", "cumulative", "unused")]
    assert counts == [4, 2, 2, 0]


def test_weights_are_one_cast_and_put_back_also_after_an_error():
    model, failed = Network(), False
    before = dict(model.named_parameters())
    try:
        with weights_in(model, torch.bfloat16), counted_together(model):
            assert model.first.weight.dtype == model.last.bias.dtype == torch.bfloat16
            # one node of the graph for all of them
            assert model.first.weight.grad_fn is model.last.weight.grad_fn
            assert not model.frozen.weight.requires_grad
            assert model.own.weight is before["own.weight"]
            assert model.tied.weight is model.twice.weight
            raise ZeroDivisionError
    except ZeroDivisionError:
        failed = True
    assert failed
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert int(model.norm.num_batches_tracked) == 0


def test_nothing_is_cast_without_a_dtype_or_counted_in_evaluation():
    model = Network().eval()
    weight, counter = model.first.weight, model.norm.num_batches_tracked
    with weights_in(model, None), counted_together(model):
        assert model.first.weight is weight
        assert model.norm.num_batches_tracked is counter


def test_tensors_of_several_kinds_are_copied():
    sources = [torch.rand(3), torch.arange(4), torch.rand(2, 3).t(), torch.rand(3)]
    targets = [
        torch.empty(3, dtype=torch.bfloat16),
        torch.empty(4, dtype=torch.long),
        torch.empty(3, 2),
        torch.empty(3),
    ]
    copy_together(targets, sources)
    assert all(torch.equal(target, source.to(target.dtype)) for target, source in zip(targets, sources))
