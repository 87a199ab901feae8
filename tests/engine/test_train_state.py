"""The average of the weights against the same recursion in float64, and a network in training that resumes."""

import pytest
import torch
from torch import nn

from nst_det.engine.keys import non_finite_node
from nst_det.engine.nan_guard import NonFiniteGuard
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.train_state import AveragedWeights, OptimizedState
from nst_det.errors import UserError

DECAY = 0.9


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def training(folder, average=True):
    model, adapters = network(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *adapters.parameters()], lr=0.1, momentum=0.9)
    averaged = AveragedWeights(model, DECAY) if average else None
    guard = NonFiniteGuard(non_finite_node(), folder, model)
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
