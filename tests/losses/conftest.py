from collections.abc import Callable

import numpy as np
import pytest
import torch

Array = np.ndarray


def check(formula: Callable[[Array], complex], loss: Callable[[torch.Tensor], torch.Tensor], x: Array) -> None:
    """``loss`` has the value of ``formula`` to 1e-9 and its gradient to 1e-7.

    The gradient of the formula is taken by a complex step: written with holomorphic operations, its imaginary part
    at ``x + 1e-30 i`` is the derivative without any cancellation.
    """
    tensor = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    value = loss(tensor)
    (gradient,) = torch.autograd.grad(value, tensor)
    assert abs(float(value.detach()) - complex(formula(x.astype(complex))).real) < 1e-9
    expected = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1e-30j
        expected[index] = complex(formula(moved)).imag / 1e-30
    assert np.abs(expected).max() > 1e-6
    assert np.abs(gradient.numpy() - expected).max() < 1e-7


@pytest.fixture(scope="session")
def check_formula() -> Callable[..., None]:
    return check


@pytest.fixture(autouse=True)
def _one_thread_one_seed(request):
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
