from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nst_det.engine.device import tf32_in
from nst_det.losses import mmd_gpu, nst_loss
from nst_det.losses.mmd import KERNELS, positions_side_is_cheaper, products_side_is_cheaper

# both sides of poly and of gaussian, and a sum that is cut
SHAPES = [(2, 96, 160, 6, 6), (2, 24, 40, 20, 25), (1, 16, 24, 64, 128)]


class Operators(TorchDispatchMode):
    """The operators that run inside, with the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.seen.append((operator.overloadpacket.__name__, getattr(result, "shape", None)))
        return result


def maps(shape, dtype):
    b, s, t, h, w = shape
    return [torch.randn(b, c, h, w).relu_().to(dtype) for c in (s, t)]


def value_and_gradient(student, teacher, kernel, **options):
    student = student.detach().requires_grad_()
    value = nst_loss(student, teacher, kernel, **options)
    return float(value.detach()), torch.autograd.grad(value, student)[0].double()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
# of value and gradient: of bf16 maps products are exact, and the gradient is rounded to 8 bits, twice
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float32, (1e-6, 1e-5)), (torch.bfloat16, (1e-6, 3e-3))])
def test_value_and_gradient_are_those_of_float64(kernel, shape, dtype, bounds):
    assert {positions_side_is_cheaper(s, t, h * w) for _, s, t, h, w in SHAPES} == {True, False}
    assert {products_side_is_cheaper(s, t, h * w) for _, s, t, h, w in SHAPES} == {True, False}
    student, teacher = maps(shape, dtype)
    # the definition's value, as the loops of test_nst.py show
    exact, exact_gradient = value_and_gradient(student.double(), teacher.double(), kernel, few_launches=False)
    value, gradient = value_and_gradient(student, teacher, kernel, few_launches=True)
    # the terms of a difference are 1 and more
    assert abs(value - exact) < bounds[0] * max(exact, 0.1)
    assert (gradient - exact_gradient).norm() < bounds[1] * exact_gradient.norm()


@pytest.mark.parametrize(
    ("shape", "slices"),
    [((2, 256, 512, 6400), 2), ((1, 30, 40, 8192), 4), ((1, 30, 40, 8197), 1), ((2, 30, 40, 100), 1)],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_long_sums_are_cut_into_slices_of_equal_length(shape, slices, channels_last):
    b, s, j, n = shape
    left, right = torch.randn(b, s, n), torch.randn(b, j, n)
    if channels_last:
        left, right = (x.mT.contiguous().mT for x in (left, right))
    with Operators() as operators:
        found = mmd_gpu.map_products(left, right)
    assert [shape for name, shape in operators.seen if name == "bmm"] == [(b * slices, s, j)]
    torch.testing.assert_close(found.double(), left.double() @ right.double().mT, rtol=1e-5, atol=1e-3)
    assert not channels_last or "clone" not in {name for name, _ in operators.seen}


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "convolutions", "products"),
    [
        (True, torch.bfloat16, True, True),
        (True, torch.float32, True, False),
        # FLOAT32_PRECISION highest
        (True, torch.bfloat16, False, False),
        (False, torch.bfloat16, True, False),
    ],
)
def test_half_precision_maps_alone_are_multiplied_in_tf32(monkeypatch, on_gpu, dtype, convolutions, products):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    assert not tf32_in()["matrix products"]
    with mmd_gpu._as_convolutions(SimpleNamespace(is_cuda=on_gpu, dtype=dtype)):
        assert tf32_in()["matrix products"] == products
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cache_of_either_way_serves_both(kernel):
    """What both ask of the teacher has the same names and values."""
    for shape in SHAPES:
        student, teacher = maps(shape, torch.float64)
        kept = []
        for few_launches in (False, True):
            found = {}

            def shared(key, compute, found=found):
                return found.setdefault(key, compute())

            nst_loss(student, teacher, kernel, shared, few_launches=few_launches)
            kept.append(found)
        assert kept[0].keys() == kept[1].keys()
        torch.testing.assert_close(*kept)
