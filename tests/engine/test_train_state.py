"""The average of the weights against the same recursion in float64, and a network in training that resumes."""

import math

import pytest
import torch
from torch import nn

from nst_det.engine.keys import NON_FINITE_KEYS, config_tree
from nst_det.engine.nan_guard import NonFiniteGuard, NotFinite, late_checks, not_finite, require_finite
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.train_state import AveragedWeights, OptimizedState
from nst_det.errors import UserError

DECAY = 0.9


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def training(folder, average=True, optimizer="SGD"):
    model, adapters = network(), nn.Linear(2, 2)
    options = {"lr": 0.1, "fused": True} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    optimizer = getattr(torch.optim, optimizer)([*model.parameters(), *adapters.parameters()], **options)
    averaged = AveragedWeights(model, DECAY) if average else None
    guard = NonFiniteGuard(config_tree(NON_FINITE_KEYS), folder, model)
    return OptimizedState(model, adapters, guard, averaged, optimizer, RunFolder(folder))


def train(state, last):
    """Noisy steps; the state of the network in training after each."""
    states = []
    while state.step < last:
        images = torch.randn(16, 4, generator=torch.Generator().manual_seed(state.step))
        state.adapters(state.model(images)).square().mean().backward()
        state.optimizer_step(lambda: None)
        states.append({name: value.clone() for name, value in state.model.state_dict().items()})
    return states


def bits(state):
    """Weights, their average and the optimizer's state; buffers are the guard's."""
    tensors = [*state.model.parameters(), *state.adapters.parameters(), *state.eval_model.state_dict().values()]
    of_parameters = state.optimizer.state_dict()["state"].values()
    return [value.clone() for value in (*tensors, *(value for one in of_parameters for value in one.values()))]


def late_step(state, broken):
    state.guard.keep_buffers(state.step)
    images = torch.randn(16, 4, generator=torch.Generator().manual_seed(state.step))
    state.adapters(state.model(images)).square().mean().backward()
    if broken:
        state.parameters[0].grad.fill_(math.nan)
    state.late_step(lambda: None, not_finite(torch.stack([parameter.grad.sum() for parameter in state.parameters])))


@pytest.fixture
def empty_is_nan():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_first_step_that_a_scaler_passes_over_leaves_no_momentum(tmp_path, empty_is_nan):
    state, known = training(tmp_path), training(tmp_path)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state.scaler.scale(state.adapters(state.model(torch.randn(4, 4))).sum() * math.inf).backward()
    state.optimizer_step(lambda: None)
    assert state.scaler.get_scale() == 2.0
    assert not any(one["momentum_buffer"].any() for one in state.optimizer.state.values())
    assert all(map(torch.equal, state.parameters, known.parameters))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_device_passes_over_a_step_that_is_not_finite(tmp_path, empty_is_nan, optimizer):
    state, known = training(tmp_path, optimizer=optimizer), training(tmp_path, optimizer=optimizer)
    # before the optimizer has any state
    late_step(state, broken=True)
    state.learn(0, finite=False)
    assert (state.step, state.suspect, state.waits) == (0, 0, True)
    for parameter, same in zip(state.parameters, known.parameters):
        assert torch.equal(parameter, same)
        assert all(not value.any() for value in state.optimizer.state[parameter].values())
    state.suspect = -1
    for step in range(3):
        late_step(state, broken=False)
        state.learn(step, finite=True)
    train(known, 3)
    assert all(map(torch.equal, bits(state), bits(known)))
    kept, buffers = bits(state), [value.clone() for value in state.model.buffers()]
    late_step(state, broken=True)
    # the next one is begun before anything is known
    state.guard.keep_buffers(state.step)
    state.model(torch.randn(16, 4)).sum().backward()
    state.learn(3, finite=False)
    assert all(map(torch.equal, bits(state), kept))
    assert all(map(torch.equal, state.model.buffers(), buffers))
    assert all(parameter.grad is None for parameter in state.parameters)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -3e38], 0), ([0.0, 0.0], 0), ([math.inf, 1.0], 1), ([1.0, -math.inf], 1), ([math.nan, 0.0], 1),
        ([math.inf, -math.inf], 1),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_marked_for_the_optimizer(values, expected):
    found = not_finite(torch.tensor([values, [0.0, 1.0]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [expected, 0]


def test_a_flag_is_read_at_once_but_where_the_trainer_reads_it_later():
    told = []
    require_finite(torch.tensor(True), lambda: told.append("not asked"))
    with late_checks() as flags:
        require_finite(torch.tensor(False), lambda: told.append("not asked"))
    assert [bool(flag) for flag in flags] == [False]
    assert not told
    with pytest.raises(NotFinite, match="the proposals"):
        require_finite(torch.tensor(False), lambda: "the proposals")


# the decay has its full value from the 32nd step on
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_the_average_is_the_recursion(tmp_path, steps, averaged_in_float64):
    state = training(tmp_path)
    expected = averaged_in_float64(train(state, steps), DECAY)
    found = state.eval_model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
    # counters are not averaged
    assert int(found["1.num_batches_tracked"]) == steps
    assert not state.eval_model.training
    assert not any(parameter.requires_grad for parameter in state.eval_model.parameters())


def test_after_many_steps_nothing_is_left_of_the_first_weights():
    trained = nn.Linear(1, 1, bias=False)
    average = AveragedWeights(trained, 0.9999)
    for step in range(200):
        trained.weight.data.fill_(1000.0 if step == 0 else 1.0)
        average.update()
    # without a rise of the decay 980 of it would be there
    assert average.network.weight.item() == pytest.approx(1.0, abs=0.01)
    average.restart()
    assert (average.steps, average.network.weight.item()) == (0, 1.0)


@pytest.mark.parametrize("average", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, average):
    whole, stopped, resumed = (training(tmp_path / name, average) for name in ("whole", "stopped", "stopped"))
    train(whole, 10)
    train(stopped, 7)
    stopped.guard.count, stopped.seconds = 2, 3.5
    stopped.save()
    resumed.resume()
    assert (resumed.step, resumed.guard.count, resumed.seconds) == (7, 2, 3.5)
    train(resumed, 10)
    for part in ("model", "adapters", "eval_model"):
        first, second = getattr(whole, part).state_dict(), getattr(resumed, part).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    training(tmp_path).save()
    with pytest.raises(UserError, match=r"SOLVER\.EMA_DECAY"):
        training(tmp_path, average=False).resume()
    other = training(tmp_path)
    other.adapters = nn.Linear(3, 3)
    with pytest.raises(UserError, match=f"^{tmp_path}.*OUTPUT_DIR"):
        other.resume()
