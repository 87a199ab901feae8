"""The average of the weights against the same recursion in float64."""

import pytest
import torch
from torch import nn

from nst_det.engine.train_state import AveragedWeights

DECAY = 0.9


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def train(trained, average, steps, seed=0):
    """Noisy steps; the state of the network in training after each."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    states = []
    for _ in range(steps):
        optimizer.zero_grad()
        trained(torch.randn(16, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        average.update()
        states.append({name: value.clone() for name, value in trained.state_dict().items()})
    return states


# the decay has its full value from the 32nd step on
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_it_is_the_recursion(steps, averaged_in_float64):
    trained = network()
    average = AveragedWeights(trained, DECAY)
    states = train(trained, average, steps)
    expected = averaged_in_float64(states, DECAY)
    found = average.network.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
    # counters are not averaged
    assert int(found["1.num_batches_tracked"]) == int(trained.state_dict()["1.num_batches_tracked"]) == steps
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


def test_after_many_steps_nothing_is_left_of_the_first_weights():
    trained = nn.Linear(1, 1, bias=False)
    average = AveragedWeights(trained, 0.9999)
    for step in range(200):
        trained.weight.data.fill_(1000.0 if step == 0 else 1.0)
        average.update()
    # without a rise of the decay 980 of it would be there
    assert average.network.weight.item() == pytest.approx(1.0, abs=0.01)


def test_it_goes_on_with_the_same_bits():
    trained, other = network(), network()
    average, another = AveragedWeights(trained, DECAY), AveragedWeights(other, DECAY)
    train(trained, average, 7)
    other.load_state_dict(trained.state_dict())
    another.load_state_dict(average.state_dict())
    for one, beside in ((trained, average), (other, another)):
        train(one, beside, 3, seed=1)
    assert average.steps == another.steps == 10
    first, second = average.network.state_dict(), another.network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_restarts_from_the_weights_in_training():
    trained = network()
    average = AveragedWeights(trained, DECAY)
    train(trained, average, 3)
    average.restart()
    assert average.steps == 0
    found = average.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained.state_dict().items())
