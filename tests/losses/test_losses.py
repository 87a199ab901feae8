"""All methods but NST against loops written from their formulas."""

import cmath
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nst_det.losses import (
    LayerPair,
    at_loss,
    cwd_loss,
    dist_loss,
    dkd_loss,
    get_term,
    hint_loss,
    kd_loss,
    lp_loss,
    pkd_loss,
    rkd_loss,
    sp_loss,
)
from nst_det.losses.mgd import generation_loss
from nst_det.losses.ops import compute_now
from nst_det.losses.vid import ChannelVariance, gaussian_nll

RNG = np.random.default_rng(2)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def softmax(row):
    top = [cmath.exp(v) for v in row]
    return [v / sum(top) for v in top]


def kl(target, row):
    return sum(p * (cmath.log(p) - cmath.log(q)) for p, q in zip(target, row))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd(temperature, check_formula):
    student, teacher = RNG.standard_normal((3, 5)), 2 * RNG.standard_normal((3, 5))

    def formula(x):
        rows = [kl(softmax(t / temperature), softmax(s / temperature)) for s, t in zip(x, teacher)]
        return temperature**2 * sum(rows) / len(rows)

    check_formula(formula, lambda x: kd_loss(x, tensor(teacher), temperature), student)


def test_kd_at_4_has_the_gradient_of_16_times_the_soft_cross_entropy():
    student, teacher = tensor(RNG.standard_normal((3, 5))).requires_grad_(), tensor(RNG.standard_normal((3, 5)))
    soft = -16 * ((teacher / 4).softmax(1) * (student / 4).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(
        torch.autograd.grad(kd_loss(student, teacher), student), torch.autograd.grad(soft, student)
    )


@pytest.mark.parametrize("power", [1, 2, 3])
def test_at(power, check_formula):
    student, teacher = RNG.standard_normal((2, 3, 2, 3)), RNG.standard_normal((2, 4, 2, 3))

    def attention(image):
        channels, height, width = image.shape
        energy = []
        for y in range(height):
            for x in range(width):
                # |v|^p as a holomorphic function of v
                column = [v if v.real >= 0 else -v for v in image[:, y, x]]
                energy.append(sum(v**power for v in column) / channels)
        norm = cmath.sqrt(sum(v * v for v in energy) + 1e-12)
        return [v / norm for v in energy]

    def formula(x):
        total = 0
        for s, t in zip(x, teacher.astype(complex)):
            total += sum((a - b) ** 2 for a, b in zip(attention(s), attention(t))) / (2 * 3)
        return total / len(x)

    check_formula(formula, lambda x: at_loss(x, tensor(teacher), power), student)


def test_vid(check_formula):
    mean, target, variance = RNG.standard_normal((2, 3, 2, 2)), RNG.standard_normal((2, 3, 2, 2)), [0.5, 1.0, 7.0]

    def formula(x):
        total = 0
        for index in np.ndindex(x.shape):
            total += 0.5 * ((x[index] - target[index]) ** 2 / variance[index[1]] + cmath.log(variance[index[1]]))
        return total / x.size

    check_formula(formula, lambda x: gaussian_nll(x, tensor(target), tensor(variance)), mean)


def test_vid_for_logits_and_in_the_variance(check_formula):
    mean, target = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 4))
    variance = np.array([0.5, 1.0, 7.0, 0.1])

    def formula(v):
        rows = [(mean[i, c] - target[i, c]) ** 2 / v[c] + cmath.log(v[c]) for i in range(3) for c in range(4)]
        return sum(rows) / 2 / len(rows)

    check_formula(formula, lambda v: gaussian_nll(tensor(mean), tensor(target), v), variance)


def test_vid_variance_is_a_softplus_that_starts_where_it_should():
    variance = ChannelVariance(3, 5.0)
    torch.testing.assert_close(variance(), torch.full((3,), 5.0))
    variance.alpha.data.fill_(-100)
    assert float(variance().min().detach()) == pytest.approx(1e-5)


@pytest.mark.parametrize(("term", "kinds"), [("vid", (4, 4)), ("vid-logits", ())])
def test_vid_variance_and_mean_are_trained(term, kinds):
    """The optimum of the variance is the mean squared error of its channel."""
    module = get_term(term).build(LayerPair("a", "a", 2, 3), variance=5.0)
    student, scale = torch.randn(256, 2, *kinds), torch.tensor([0.3, 1.0, 3.0])
    target = torch.randn(256, 3, *kinds) * scale.view(3, *[1] * len(kinds))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    assert any(parameter.shape == (3,) for group in optimizer.param_groups for parameter in group["params"])
    for _ in range(250):
        optimizer.zero_grad()
        module(student, target, compute_now).backward()
        optimizer.step()
    torch.testing.assert_close(module.variance().detach(), scale.square(), rtol=0.2, atol=0)
    assert "variance.alpha" in module.state_dict()


@pytest.mark.parametrize("network", ["repdistiller", "bn", "linear"])
def test_vid_networks_have_the_layers_of_their_sources(network):
    module = get_term("vid").build(LayerPair("a", "b", 2, 3), network=network)
    convolutions = [layer for layer in module.mean.modules() if isinstance(layer, nn.Conv2d)]
    widths = [(conv.in_channels, conv.out_channels) for conv in convolutions]
    expected = {"repdistiller": [(2, 3), (3, 3), (3, 3)], "bn": [(2, 10), (10, 3)], "linear": [(2, 3)]}[network]
    assert widths == expected
    assert all(conv.kernel_size == (1, 1) and (conv.bias is None) == (network != "linear") for conv in convolutions)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in module.mean.modules()) == 2 * (network == "bn")
    value = module(torch.randn(2, 2, 4, 4), torch.randn(2, 3, 2, 2), compute_now)
    assert value.isfinite()


@pytest.mark.parametrize("sigma", ["neighbors", 1.5])
@pytest.mark.parametrize("k", [2, 10])
def test_lp(sigma, k, check_formula):
    student, teacher = RNG.standard_normal((5, 3)), RNG.standard_normal((5, 4)) + 3
    count = min(k, 4)

    def formula(x):
        neighbors = []
        for i in range(5):
            others = [(sum((teacher[i] - teacher[j]) ** 2), j) for j in range(5) if j != i]
            neighbors += [(i, j, d) for d, j in sorted(others)[:count]]
        variance = sum(d for *_, d in neighbors) / len(neighbors) if sigma == "neighbors" else sigma**2
        return sum(np.exp(-d / variance) * sum((x[i] - x[j]) ** 2) for i, j, d in neighbors) / 5

    check_formula(formula, lambda x: lp_loss(x, tensor(teacher), k, sigma), student)


def test_lp_of_equal_or_single_samples():
    same = torch.ones(4, 3, requires_grad=True)
    value = lp_loss(same, torch.ones(4, 6))
    value.backward()
    assert float(value.detach()) == 0
    assert torch.isfinite(same.grad).all()
    assert float(lp_loss(torch.randn(1, 3), torch.randn(1, 6))) == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_cwd(temperature, check_formula):
    student, teacher = RNG.standard_normal((2, 3, 2, 2)), RNG.standard_normal((2, 3, 2, 2))

    def formula(x):
        total = 0
        for b in range(2):
            for c in range(3):
                total += kl(softmax(teacher[b, c].ravel() / temperature), softmax(x[b, c].ravel() / temperature))
        return temperature**2 * total / 6

    check_formula(formula, lambda x: cwd_loss(x, tensor(teacher), temperature), student)


def test_pkd(check_formula):
    student, teacher = RNG.standard_normal((2, 3, 2, 2)), RNG.standard_normal((2, 3, 2, 2))

    def standardized(maps, c):
        values = [v for image in maps for v in image[c].ravel()]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        return [(v - mean) / cmath.sqrt(variance + 1e-6) for v in values]

    def formula(x):
        total = 0
        for c in range(3):
            total += sum((a - b) ** 2 for a, b in zip(standardized(x, c), standardized(teacher, c)))
        return total / (2 * x.size)

    check_formula(formula, lambda x: pkd_loss(x, tensor(teacher)), student)


def smooth_l1(x, y):
    off = x - y if x.real >= y.real else y - x
    return off**2 / 2 if off.real < 1 else off - 0.5


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def test_sp(check_formula):
    student, teacher = RNG.standard_normal((3, 2, 2, 2)), RNG.standard_normal((3, 4, 2, 2))

    def rows(maps):
        for image in maps:
            row = [dot(image.ravel(), other.ravel()) for other in maps]
            yield [v / cmath.sqrt(dot(row, row) + 1e-6) for v in row]

    def formula(x):
        return sum((a - b) ** 2 for s, t in zip(rows(x), rows(teacher)) for a, b in zip(s, t)) / 9

    check_formula(formula, lambda x: sp_loss(x, tensor(teacher)), student)


@pytest.mark.parametrize(
    ("distance", "angle", "at_once"), [(25.0, 0.0, 4), (25.0, 0.0, 0), (0.0, 50.0, 4), (1.0, 2.0, 3), (0.0, 1.0, 0)]
)
def test_rkd(distance, angle, at_once, check_formula, monkeypatch):
    # 4 samples, embeddings of 5 numbers at most: so many rows or corners at a time, one at least
    monkeypatch.setattr("nst_det.losses.rkd.MOST_NUMBERS", at_once * 4 * 5)
    student, teacher = 3 * RNG.standard_normal((4, 3)), RNG.standard_normal((4, 5))

    def distances(x):
        found = {
            (i, j): cmath.sqrt(dot(x[i] - x[j], x[i] - x[j]) + 1e-6) for i, j in itertools.permutations(range(4), 2)
        }
        mean = sum(found.values()) / 12
        return {pair: value / mean for pair, value in found.items()}

    def angles(x):
        for i, j, k in itertools.product(range(4), repeat=3):
            one, two = x[i] - x[j], x[i] - x[k]
            yield dot(one, two) / cmath.sqrt(dot(one, one) + 1e-6) / cmath.sqrt(dot(two, two) + 1e-6)

    def formula(x):
        mine, theirs = distances(x), distances(teacher)
        pairs = sum(smooth_l1(value, theirs[pair]) for pair, value in mine.items()) / 16
        return distance * pairs + angle * sum(map(smooth_l1, angles(x), angles(teacher))) / 64

    check_formula(formula, lambda x: rkd_loss(x, tensor(teacher), distance, angle), student)


@pytest.mark.parametrize(("target", "others", "temperature"), [(1.0, 0.5, 1.0), (2.0, 8.0, 4.0), (0.0, 1.0, 1.0)])
def test_dkd(target, others, temperature, check_formula):
    student, teacher, labels = RNG.standard_normal((3, 4)), 2 * RNG.standard_normal((3, 4)), [0, 3, 1]

    def formula(x):
        total = 0
        for s, t, label in zip(x, teacher, labels):
            p, q = softmax(t / temperature), softmax(s / temperature)
            rest = [k for k in range(4) if k != label]
            total += target * kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
            total += others * kl(*([r[k] / (1 - r[label]) for k in rest] for r in (p, q)))
        return temperature**2 * total / 3

    def loss(x):
        return dkd_loss(x, tensor(teacher), torch.tensor(labels), target, others, temperature)

    check_formula(formula, loss, student)


@pytest.mark.parametrize(("inter", "intra", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 2.0, 4.0)])
def test_dist(inter, intra, temperature, check_formula):
    student, teacher = RNG.standard_normal((3, 4)), 2 * RNG.standard_normal((3, 4))

    def one_minus_r(x, y):
        x, y = ([v - sum(values) / len(values) for v in values] for values in (x, y))
        return 1 - dot(x, y) / cmath.sqrt((dot(x, x) + 1e-12) * (dot(y, y) + 1e-12))

    def formula(x):
        p, q = (np.array([softmax(row / temperature) for row in logits]) for logits in (x, teacher))
        images, classes = (sum(map(one_minus_r, a, b)) / len(a) for a, b in ((p, q), (p.T, q.T)))
        return temperature**2 * (inter * images + intra * classes)

    check_formula(formula, lambda x: dist_loss(x, tensor(teacher), inter, intra, temperature), student)


def test_relations_of_one_sample_or_none_are_finite():
    one, none = torch.randn(1, 3), torch.randn(0, 3)
    assert float(rkd_loss(one, torch.randn(1, 6))) == 0
    for rows in (one, none):
        labels = torch.zeros(len(rows), dtype=torch.int64)
        assert dist_loss(rows, rows).isfinite()
        assert float(dkd_loss(rows, rows, labels)) == 0


@pytest.mark.parametrize(("loss", "terms"), [(hint_loss, 24), (generation_loss, 2)])
def test_squared_differences_of_maps(loss, terms, check_formula):
    student, teacher = RNG.standard_normal((2, 3, 2, 2)), RNG.standard_normal((2, 3, 2, 2))

    def formula(x):
        return sum((a - b) ** 2 for a, b in zip(x.ravel(), teacher.ravel())) / terms

    check_formula(formula, lambda x: loss(x, tensor(teacher)), student)


def test_mgd_masks_whole_positions_in_training_only():
    module = get_term("mgd").build(LayerPair("a", "a", 3, 3), masked=0.45)
    seen = []
    module.generator.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    student, teacher = torch.ones(4, 3, 40, 40), torch.randn(4, 3, 40, 40)
    module(student, teacher, compute_now)
    masked = seen[0] == 0
    assert (masked.all(1) == masked.any(1)).all()
    assert float(masked.float().mean()) == pytest.approx(0.45, abs=0.02)
    module.eval()
    first, second = (module(student, teacher, compute_now) for _ in range(2))
    assert torch.equal(seen[1], student)
    assert torch.equal(first, second)


@pytest.mark.parametrize("regressor", ["conv", "conv-bn-relu"])
def test_the_fitnet_regressor_leads_to_the_teachers_channels(regressor):
    module = get_term("fitnet").build(LayerPair("a", "b", 3, 5), regressor=regressor)
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    pooled = nn.functional.avg_pool2d(student, 2)
    with torch.no_grad():
        expected = (module.regressor(pooled) - teacher).square().mean()
        torch.testing.assert_close(module(student, teacher, compute_now), expected)
    assert len(module.regressor) == (1 if regressor == "conv" else 3)


INVARIANCES = {
    "at": (at_loss, lambda maps, scale, shift: 200 * scale[0, 0] * maps),
    "pkd": (pkd_loss, lambda maps, scale, shift: maps * (5 * scale[:1] + 0.5) - shift[:1]),
    "cwd": (cwd_loss, lambda maps, scale, shift: maps + 10 * shift),
}


@pytest.mark.parametrize("name", INVARIANCES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_a_loss_does_not_see_of_a_map(name, seed):
    """at: its scale; pkd: scale and shift of a channel; cwd: the shift of a channel."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64) + 0.1
    scale = torch.rand(2, 3, 1, 1, generator=generator, dtype=torch.float64) + 1e-3
    shift = torch.randn(2, 3, 1, 1, generator=generator, dtype=torch.float64)
    loss, moved = INVARIANCES[name]
    expected = float(loss(student, teacher))
    assert float(loss(moved(student, scale, shift), teacher)) == pytest.approx(expected, rel=1e-4)


LOSSES = {"kd": kd_loss, "at": at_loss, "cwd": cwd_loss, "pkd": pkd_loss, "fitnet": hint_loss}


@pytest.mark.parametrize("name", LOSSES)
def test_zero_for_equal_outputs_and_no_gradient_to_the_teacher(name):
    shape = (2, 6) if name == "kd" else (2, 3, 4, 4)
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert 0 <= float(LOSSES[name](student, student.detach()).detach()) < 1e-15
    value = LOSSES[name](student, teacher)
    assert float(value.detach()) > 0.001
    value.backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["at", "cwd", "pkd", "fitnet"])
def test_dead_channels_give_finite_values_and_gradients(name):
    student, teacher = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    student[0, 0] = 1
    teacher[:, 1] = 0
    student.requires_grad_()
    value = LOSSES[name](student, teacher)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (kd_loss, [(2, 3), (2, 4)]),
        (at_loss, [(2, 3, 4, 4), (3, 3, 4, 4)]),
        (lp_loss, [(2, 3), (3, 3)]),
        *((loss, [(2, 3, 4, 4), (2, 4, 4, 4)]) for loss in (hint_loss, cwd_loss, pkd_loss)),
    ],
)
def test_shapes_that_cannot_be_compared_are_refused(loss, shapes):
    with pytest.raises(ValueError, match=r"\d"):
        loss(*(torch.rand(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("term", "options", "named"),
    [
        ("kd", {"temperature": 0}, "temperature"),
        ("cwd", {"temperature": -1}, "temperature"),
        ("at", {"power": 0.5}, "power"),
        ("fitnet", {"regressor": "mlp"}, "conv, conv-bn-relu"),
        ("fitnet", {"grid": 0}, "grid"),
        ("vid", {"network": "mlp"}, "repdistiller, bn, linear"),
        ("vid", {"variance": 0.0}, "variance"),
        ("lp", {"k": 0}, "k must"),
        ("lp", {"sigma": "mean"}, "neighbors"),
        ("mgd", {"masked": 1.0}, "masked"),
        ("rkd", {"distance": -1}, "distance"),
        *((term, {"temperature": 0}, "temperature") for term in ("dkd", "dist")),
        ("dkd", {"target": 0, "others": 0}, "others"),
        ("dist", {"intra": -1}, "intra"),
        ("reviewkd", {"width": 0}, "width"),
        ("fgd", {"temperature": 0}, "temperature"),
        ("fgd", {"objects": -1}, "objects"),
        ("pkd", {}, "res3:res4.*64.*256"),
        ("vid-logits", {}, "width"),
    ],
)
def test_a_term_that_cannot_be_built_names_the_option(term, options, named):
    pair = LayerPair("res3", "res4", 0 if term == "vid-logits" else 64, 256)
    with pytest.raises(ValueError, match=f"{term}.*{named}"):
        get_term(term).build([pair] if get_term(term).joint else pair, **options)


def test_larger_maps_are_averaged_down():
    small, big = torch.randn(2, 3, 3, 4, dtype=torch.float64), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    pooled = nn.functional.avg_pool2d(big, 2)
    for loss in (hint_loss, at_loss, cwd_loss, pkd_loss, partial(at_loss, power=1)):
        torch.testing.assert_close(loss(small, big), loss(small, pooled))
        torch.testing.assert_close(loss(big, small), loss(pooled, small))


@pytest.mark.parametrize("variance", [2e-5, 0.5, 5.0, 800.0])
def test_vid_begins_with_the_variance_that_is_asked_for(variance):
    module = get_term("vid").build(LayerPair("res3", "res4", 2, 3), variance=variance)
    torch.testing.assert_close(module.variance(), torch.full((3,), variance))


@pytest.mark.parametrize("network", ["repdistiller", "bn", "linear"])
def test_vid_of_a_vector_predicts_the_averaged_map_at_every_position(network):
    torch.manual_seed(0)
    pair = LayerPair("hidden1", "res4", 5, 3, vector=True)
    module = get_term("vid").build(pair, network=network, grid=2).double().eval()
    student, teacher = torch.randn(2, 5, 1, 1).double(), torch.randn(2, 3, 4, 6).double()
    found = module(student, teacher, compute_now)
    variance = torch.nn.functional.softplus(module.variance.alpha) + 1e-5
    mean = module.mean(student)
    total = 0.0
    for image, channel, row, column in itertools.product(range(2), range(3), range(2), range(2)):
        wanted = teacher[image, channel, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3].mean()
        off = mean[image, channel, row, column] - wanted
        total += 0.5 * (off**2 / variance[channel] + variance[channel].log())
    assert found.item() == pytest.approx(total.item() / 24, rel=1e-9)
    assert len({round(value, 9) for value in mean[0, 0].flatten().tolist()}) > 1, "each position has weights of its own"
    if network == "linear":
        weight, bias = (value.unflatten(0, (3, 2, 2)) for value in module.mean[1].parameters())
        assert torch.allclose(mean, torch.einsum("bs,tijs->btij", student[:, :, 0, 0], weight) + bias)


def test_fitnet_of_a_vector_hits_the_averaged_map():
    module = get_term("fitnet").build(LayerPair("hidden1", "res4", 5, 3, vector=True), grid=1).double()
    student, teacher = torch.randn(2, 5, 1, 1).double(), torch.randn(2, 3, 4, 6).double()
    off = module.regressor(student)[:, :, 0, 0] - teacher.mean((2, 3))
    assert module(student, teacher, compute_now).item() == pytest.approx(off.square().mean().item(), rel=1e-9)
