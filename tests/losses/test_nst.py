import cmath
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nst_det.losses import nst_loss
from nst_det.losses.mmd import positions_side_is_cheaper

KERNELS = ["linear", "poly", "gaussian"]
EPS = 1e-6
# whatever the maps are on
WAYS = [partial(nst_loss, few_launches=few) for few in (False, True)]
BOTH_WAYS = pytest.mark.parametrize("loss", WAYS, ids=["as on a CPU", "as on a GPU"])


def mmd_by_loops(student, teacher, kernel):
    """The definition: single channels as samples, all pairs, one image after the other."""
    total = 0
    for image_s, image_t in zip(student, teacher):
        s, t = [[channel.ravel() for channel in image] for image in (image_s, image_t)]
        s, t = [[x / cmath.sqrt(sum(v * v for v in x) + EPS) for x in channels] for channels in (s, t)]
        both = s + t
        distances = [sum((x - y) ** 2).real for x in both for y in both]
        variance = max(sum(distances) / len(distances), 1e-3)

        def k(x, y, variance=variance):
            if kernel == "gaussian":
                return cmath.exp(-sum((x - y) ** 2) / (2 * variance))
            product = sum(a * b for a, b in zip(x, y))
            return product**2 if kernel == "poly" else product

        total += sum(k(x, y) for x in t for y in t) / len(t) ** 2
        total += sum(k(x, y) for x in s for y in s) / len(s) ** 2
        total -= 2 * sum(k(x, y) for x in t for y in s) / (len(s) * len(t))
    return total / len(student)


# positions side and channels side for poly; few and many channels for gaussian
SHAPES = [(2, 3, 4, 2, 2), (2, 2, 3, 3, 4), (1, 4, 3, 1, 3)]


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_of_the_definition(loss, shape, kernel, check_formula):
    assert {positions_side_is_cheaper(s, t, h * w) for _, s, t, h, w in SHAPES} == {True, False}
    b, s, t, h, w = shape
    rng = np.random.default_rng(1)
    student, teacher = rng.standard_normal((b, s, h, w)), rng.standard_normal((b, t, h, w))
    check_formula(
        partial(mmd_by_loops, teacher=teacher, kernel=kernel),
        lambda x: loss(x, torch.tensor(teacher), kernel),
        student,
    )


# gaussian holds its bandwidth constant in the gradient, which a numerical gradient doesn't; the loops above do
@BOTH_WAYS
@pytest.mark.parametrize("kernel", ["linear", "poly"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 2), (2, 2, 3, 4, 4), (3, 9, 7, 2, 2), (2, 3, 3, 5, 5)])
@pytest.mark.parametrize("limit", [None, 1])
def test_gradcheck(loss, shape, kernel, limit):
    b, s, t, h, w = shape
    student = torch.randn(b, s, h, w, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(b, t, h, w, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, kernel, limit=limit), student)


maps = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))


def draw(shape):
    b, s, t, n, seed = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(b, c, n, n + 1) for c in (s, t)]
    return [torch.randn(size, generator=generator, dtype=torch.float64) + 0.1 for size in sizes], generator


@BOTH_WAYS
@settings(max_examples=40, deadline=None)
@given(maps, st.sampled_from(KERNELS))
def test_order_and_scale_of_channels_do_not_matter(loss, shape, kernel):
    (student, teacher), generator = draw(shape)
    value = float(loss(student, teacher, kernel))
    order = torch.randperm(student.shape[1], generator=generator)
    assert float(loss(student[:, order], teacher, kernel)) == pytest.approx(value, abs=1e-12)
    # eps is seen only by channels with a norm near 1e-3
    scale = 100 * torch.rand(len(student), student.shape[1], 1, 1, generator=generator, dtype=torch.float64) + 1
    big = student * 1e3
    assert float(loss(big * scale, teacher, kernel)) == pytest.approx(float(loss(big, teacher, kernel)), abs=1e-9)


@BOTH_WAYS
@settings(max_examples=40, deadline=None)
@given(maps, st.sampled_from(KERNELS), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_never_negative_and_zero_for_equal_sets(loss, shape, kernel, dtype):
    (student, teacher), generator = draw(shape)
    student, teacher = student.to(dtype), teacher.to(dtype)
    assert float(loss(student, teacher, kernel)) >= 0
    order = torch.randperm(teacher.shape[1], generator=generator)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    if loss is WAYS[1] and kernel == "gaussian":
        # the smallest bandwidth magnifies rounding, which the other way makes alike on both sides
        bound *= 100
    for same in (teacher, teacher[:, order], teacher.repeat(1, 2, 1, 1)):
        value = float(loss(same, teacher, kernel))
        assert 0 <= value < bound


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 5), (2, 30, 40, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dead_channels_give_finite_values_and_gradients(loss, kernel, shape, dtype):
    b, s, t, h, w = shape
    student, teacher = torch.randn(b, s, h, w), torch.randn(b, t, h, w)
    student[:, 0], teacher[:, 1], student[1] = 0, 0, 0
    student = student.to(dtype).requires_grad_()
    value = loss(student, teacher.to(dtype), kernel)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    # d(x / sqrt(x'x + eps)) at 0 is 1 / sqrt(eps)
    assert student.grad.abs().max() < 1e3
    zeros = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = loss(zeros, torch.zeros(2, 5, 4, 4), kernel)
    value.backward()
    assert 0 <= float(value.detach()) < 1e-15
    assert not zeros.grad.any()


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(loss, kernel, dtype):
    student, teacher = torch.randn(2, 6, 6, 6).to(dtype), torch.randn(2, 9, 6, 6).to(dtype)
    exact = student.double().requires_grad_()
    expected = loss(exact, teacher.double(), kernel)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, kernel)
    # a loss scaler's factor, as in AMP
    (gradient,) = torch.autograd.grad(value * 1024, student)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    bound = float(expected_gradient.abs().max()) * (0.01 if dtype == torch.bfloat16 else 0.002)
    assert (gradient.double() / 1024 - expected_gradient).abs().max() < bound


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6, 7), (3, 20, 30, 2, 3)])
def test_channels_last_gives_the_same_and_keeps_the_strides(loss, kernel, shape):
    b, s, t, h, w = shape
    student, teacher = torch.randn(b, s, h, w, dtype=torch.float64), torch.randn(b, t, h, w, dtype=torch.float64)
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        x = student.clone(memory_format=form).requires_grad_()
        value = loss(x, teacher.clone(memory_format=form), kernel)
        (gradient,) = torch.autograd.grad(value, x)
        assert gradient.stride() == x.stride()
        results.append((value, gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_larger_map_is_averaged_down_on_each_axis(loss, kernel):
    student, teacher = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(2, 5, 8, 4, dtype=torch.float64)
    small = student.reshape(2, 3, 4, 4, 2).mean(4).requires_grad_()
    target = teacher.reshape(2, 5, 4, 2, 4).mean(3)
    expected = loss(small, target, kernel)
    (pooled_gradient,) = torch.autograd.grad(expected, small)
    student.requires_grad_()
    value = loss(student, teacher, kernel)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, pooled_gradient.repeat_interleave(2, 3) / 2)


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(8, 10, 12, 3, 3), (8, 3, 4, 6, 6), (4, 8, 300, 3, 3)])
def test_chunks_change_nothing(loss, kernel, shape):
    b, s, t, h, w = shape
    student = torch.randn(b, s, h, w, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(b, t, h, w, dtype=torch.float64)
    results = []
    for limit in (2**30, 5000, 1):
        value = loss(student, teacher, kernel, limit=limit)
        results.append((value, *torch.autograd.grad(value, student)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-14)


@BOTH_WAYS
def test_memory_is_bounded_by_the_limit(loss):
    """No tensor of the computation, counted as it is made, exceeds the gradient, the limit or the teacher's part."""
    from torch.utils._python_dispatch import TorchDispatchMode

    student, teacher = torch.randn(16, 12, 16, 16, requires_grad=True), torch.randn(16, 96, 16, 16)
    given = {x.untyped_storage().data_ptr() for x in (student, teacher)}

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                    self.size = max(self.size, x.numel() * x.element_size())
            return result

    limit = 2**17
    for kernel in KERNELS:
        with Largest() as seen:
            loss(student, teacher, kernel, limit=limit).backward()
        products_of_teacher = 4 * 16 * 96 * 96
        allowed = max(student.numel() * 4, limit, products_of_teacher if kernel == "gaussian" else 0)
        assert seen.size <= allowed


@BOTH_WAYS
@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_works_twice_and_asks_for_nothing_more(loss, kernel):
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    value = loss(student, teacher, kernel)
    first, none = torch.autograd.grad(value, (student, teacher), retain_graph=True, allow_unused=True)
    assert none is None
    kept = first.clone()
    torch.testing.assert_close(torch.autograd.grad(3 * value, student)[0], 3 * kept)
    assert torch.equal(first, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, student)
    assert not loss(student.detach(), teacher, kernel).requires_grad
    with torch.no_grad():
        assert not loss(student, teacher, kernel).requires_grad


@pytest.mark.parametrize(("batch", "kernel", "named"), [(2, "rbf", "linear, poly, gaussian"), (1, "poly", "one B")])
def test_wrong_input_is_refused(batch, kernel, named):
    with pytest.raises(ValueError, match=named):
        nst_loss(torch.rand(2, 3, 4, 4), torch.rand(batch, 3, 4, 4), kernel)
