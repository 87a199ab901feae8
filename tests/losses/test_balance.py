import copy
import math

import pytest
import torch
from torch import nn

from nst_det.losses import ModelOutputs, TermBalance, build_transfer, gradient_norms
from nst_det.losses.loss_balance import STEPS, GradientBalance

CHANNELS = {"res4": 6}


def test_the_norms_are_those_of_the_gradients_written_by_hand():
    a = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    b = torch.tensor([0.5, 4.0, -1.0], requires_grad=True)
    product, square = 3 * (a * b).sum(), (b**2).sum()
    elsewhere = torch.tensor(7.0, requires_grad=True)
    norms = gradient_norms([product, square, elsewhere * 2, torch.tensor(1.0)], [a, b])
    # d/da 3ab = 3b, d/db 3ab = 3a, d/db b^2 = 2b
    by_hand = [3 * math.sqrt(0.25 + 16 + 1 + 1 + 4 + 9), 2 * math.sqrt(0.25 + 16 + 1), 0, 0]
    assert norms.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert a.grad is None
    (product + square).backward()
    torch.testing.assert_close(b.grad, 3 * a.detach() + 2 * b.detach())
    zeros = torch.zeros(2, requires_grad=True)
    assert gradient_norms([zeros.sqrt().sum(), (zeros / 0).sum()], [zeros]).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("ratio", [10.5, 9.5, 0.11, 0.09, 0, None])
def test_beyond_ten_to_one_there_is_a_warning(ratio):
    line = TermBalance("at", 1, 0.1, 1.0, ratio)
    assert line.one_sided == (ratio in (10.5, 0.09, 0))
    assert not TermBalance("at", 0, 0.1, 1.0, ratio).one_sided
    if line.one_sided:
        assert "\n" not in line.warning
        assert " at at " in line.warning


def teacher_and_student(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    return backbone, nn.Linear(6, 10)


def step(loss, backbone, head, index, batch=8):
    """One forward pass at a step of its own images: the task's loss and the terms."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(batch, 3, 8, 8, generator=generator)
    maps = backbone(images)
    student = ModelOutputs(logits=head(maps.mean((2, 3))), maps={"res4": maps})
    teacher = ModelOutputs(
        logits=torch.randn(batch, 10, generator=generator),
        maps={"res4": torch.rand(batch, 9, 8, 8, generator=generator)},
    )
    task = nn.functional.cross_entropy(student.logits, torch.arange(batch) % 10)
    return task, loss(student, teacher)


def build(method, **settings):
    return build_transfer(
        method, levels=["res4"], student_channels=CHANNELS, teacher_channels={"res4": 9}, num_classes=10, **settings
    )


def norm_of(loss, backbone):
    """Measured by a backward pass into ``.grad``, not by the function under test."""
    backbone.zero_grad()
    loss.backward(retain_graph=True)
    return math.sqrt(sum(float(parameter.grad.double().square().sum()) for parameter in backbone.parameters()))


def test_the_share_after_scaling_is_the_target():
    backbone, head = teacher_and_student()
    loss = build("kd+at+nst-poly", auto_weight={"nst-poly": 0.5, "at": 2.0, "vid": 1.0}, weights={"at": 7.0})
    ratios = {"at": [], "nst-poly": []}
    for index in range(STEPS):
        assert loss.balance.wants(index)
        task, terms = step(loss, backbone, head, index)
        before = dict(loss.weights)
        terms = loss.balance(task, terms, list(backbone.parameters()))
        assert not loss.balance.wants(index), "a step is measured on the first part of its images"
        pull = norm_of(task, backbone)
        for name, seen in ratios.items():
            seen.append(norm_of(terms[name], backbone) / pull / loss.weights[name])
        if index == 0:
            # from the very first step on
            assert norm_of(terms["nst-poly"], backbone) == pytest.approx(0.5 * pull, rel=1e-4)
            assert norm_of(terms["at"], backbone) == pytest.approx(2.0 * pull, rel=1e-4)
        assert before["kd"] == loss.weights["kd"] == 1.0
    assert not loss.balance.wants(STEPS)
    for name, share in (("at", 2.0), ("nst-poly", 0.5)):
        assert loss.weights[name] == pytest.approx(share / sorted(ratios[name])[STEPS // 2], rel=1e-4)
    lines = {line.term: line for line in loss.balance.lines}
    assert list(lines) == ["kd", "at", "nst-poly"]
    assert (lines["at"].ratio, lines["at"].share) == (pytest.approx(2.0), 2.0)
    assert lines["kd"].share is None
    assert lines["kd"].value == pytest.approx(float(terms["kd"].detach()))


def run(loss, backbone, head, steps):
    """The values of nst-poly in some steps, and the state dict after the first three of them."""
    values, saved = [], {}
    for index in steps:
        task, terms = step(loss, backbone, head, index)
        if loss.balance.wants(index):
            terms = loss.balance(task, terms, list(backbone.parameters()))
        values.append(terms["nst-poly"].detach())
        if index == 2:
            saved = copy.deepcopy(loss.state_dict())
    return values, saved


def test_what_was_measured_is_in_the_state_dict_and_a_resumed_run_is_the_same():
    settings = {"auto_weight": {"nst-poly": 1.0}}
    backbone, head = teacher_and_student()
    whole = build("nst-poly", **settings)
    values, saved = run(whole, backbone, head, range(STEPS + 1))
    resumed, done = build("nst-poly", **settings), build("nst-poly", **settings)
    resumed.load_state_dict(saved)
    assert resumed.balance.measured == 3
    assert run(resumed, backbone, head, range(3, STEPS + 1))[0] == values[3:]
    done.load_state_dict(whole.state_dict())
    assert done.weights == resumed.weights == whole.weights
    assert not done.balance.wants(STEPS)


def test_without_shares_one_step_is_measured_and_nothing_is_changed_or_saved():
    backbone, head = teacher_and_student()
    loss = build("kd+nst-poly")
    assert loss.state_dict() == {}
    task, terms = step(loss, backbone, head, 0)
    state = torch.get_rng_state()
    same = loss.balance(task, terms, list(backbone.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(same[name] is terms[name] for name in terms)
    assert not loss.balance.wants(1)
    assert loss.weights == {"kd": 1.0, "nst-poly": 50.0}
    for line in loss.balance.lines:
        assert line.norm == pytest.approx(norm_of(terms[line.term], backbone), rel=1e-5)
        assert line.ratio == pytest.approx(line.norm / norm_of(task, backbone), rel=1e-5)
    # a resumed run is not measured again
    assert not build("kd").balance.wants(3)
    assert not build("ce").balance.wants(0)


def test_a_measured_step_goes_backward_to_the_same_bits():
    gradients = []
    for measured in (False, True):
        backbone, head = teacher_and_student()
        loss = build("kd+at+nst-linear+nst-poly+nst-gaussian+cwd")
        torch.manual_seed(3)
        for parameter in loss.parameters():
            nn.init.normal_(parameter)
        task, terms = step(loss, backbone, head, 0)
        if measured:
            terms = loss.balance(task, terms, list(backbone.parameters()))
        (task + torch.stack(list(terms.values())).sum()).backward()
        gradients.append([parameter.grad for parameter in (*backbone.parameters(), *head.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_a_weight_in_the_method_goes_before_auto_weight():
    loss = build("at:3+nst-poly", auto_weight={"at": 1.0, "nst-poly": 1.0}, weights={"nst-poly": 0})
    assert loss.balance.shares == {"nst-poly": 1.0}
    assert loss.weights == {"at": 3.0, "nst-poly": 1.0}


def test_a_term_that_does_not_reach_the_backbone_gets_no_weight():
    balance, parameter = GradientBalance({"at": 1.0}, {"at": 1.0}), torch.ones(1, requires_grad=True)
    elsewhere = torch.ones(1, requires_grad=True)
    for index in range(STEPS - 1):
        assert balance.wants(index)
        balance(parameter.sum(), {"at": elsewhere.sum()}, [parameter])
    with pytest.raises(ValueError, match=f"AUTO_WEIGHT: at .* in the first {STEPS} steps"):
        balance(parameter.sum(), {"at": elsewhere.sum()}, [parameter])


def test_steps_without_a_finite_gradient_are_left_out():
    balance, parameter = GradientBalance({"at": 1.0}, {"at": 1.0}), torch.ones(1, requires_grad=True)
    for factor in (math.inf, 0.0, 4.0, math.nan, 8.0):
        value = balance.weights["at"] * (parameter * factor).sum()
        terms = balance(parameter.sum(), {"at": value}, [parameter])
    assert balance.weights["at"] == pytest.approx(1 / 6)
    assert float(terms["at"].detach()) == pytest.approx(8 / 6, rel=1e-6)


def test_several_processes_take_the_mean_of_their_norms(monkeypatch):
    """As the second of two processes whose first one saw the norms 3 (task) and 8 (term)."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda norms: norms.add_(torch.tensor([3.0, 8.0])))
    balance, parameter = GradientBalance({"at": 1.0}, {"at": 0.5}), torch.ones(1, requires_grad=True)
    balance((parameter * 5).sum(), {"at": (parameter * 2).sum()}, [parameter])
    # task (3 + 5) / 2, term (8 + 2) / 2
    assert balance.weights["at"] == pytest.approx(0.5 * 4 / 5)
