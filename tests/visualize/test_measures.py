import math
import sys

import numpy as np
import pytest
import torch

from nst_det.errors import UserError
from nst_det.visualize.measures import linear_cka, principal_plane, tsne_plane, unit_channels


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def hsic_cka(x, y):
    """CKA by Gram matrices and the centering matrix (Kornblith et al. 2019, equations 1 to 4), in float64."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(x)
    center = np.eye(n) - np.ones((n, n)) / n
    k, m = x @ x.T, y @ y.T

    def hsic(a, b):
        return np.trace(a @ center @ b @ center) / (n - 1) ** 2

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize(("points", "first", "second"), [(60, 5, 9), (200, 32, 16), (7, 30, 40), (50, 1, 1)])
def test_cka_is_that_of_the_gram_matrices(points, first, second):
    x = random(points, first) + 3
    y = random(points, second, seed=1) + 0.5 * x[:, :1]
    assert linear_cka(x, y) == pytest.approx(hsic_cka(x, y), rel=1e-10)


def test_what_cka_does_not_see_and_what_it_sees():
    x = random(300, 6)
    turn = torch.linalg.qr(random(6, 6, seed=2).double()).Q.float()
    assert linear_cka(x, 5 * x @ turn - 2) == pytest.approx(1, abs=1e-6)
    # independent and many points: about p q / n of chance
    assert linear_cka(x, random(300, 6, seed=3)) < 0.1
    assert math.isnan(linear_cka(x, torch.ones(300, 2)))
    # a stretch along one axis is seen
    assert linear_cka(x, x * torch.tensor([30.0, 1, 1, 1, 1, 1])) < 0.6


def test_unit_channels_and_dead_ones():
    maps = random(3, 4, 2, 2)
    maps[:, 1] = 0
    maps[:, 2] = 1e-5
    units, alive = unit_channels(maps)
    assert alive.tolist() == [True, False, False, True]
    wanted = maps[:, 3].double().flatten()
    np.testing.assert_allclose(units[3], wanted / wanted.norm(), rtol=1e-12)
    assert not units[1].any()


def test_the_plane_is_that_of_the_covariance():
    points = random(40, 12) * torch.linspace(3, 0.2, 12) + 7
    plane, share = principal_plane(points)
    values, vectors = np.linalg.eigh(np.cov(points.double().numpy().T))
    centered = points.double().numpy() - points.double().numpy().mean(0)
    for axis in (0, 1):
        wanted = centered @ vectors[:, -1 - axis]
        found = plane[:, axis].numpy()
        assert min(np.abs(found - wanted).max(), np.abs(found + wanted).max()) < 1e-9
        assert found[np.abs(found).argmax()] > 0
    assert share == pytest.approx(values[-2:].sum() / values.sum(), rel=1e-9)
    # two points, or all the same, are no error
    assert principal_plane(random(2, 5))[0][:, 1].abs().max() < 1e-6
    same, none = principal_plane(torch.ones(4, 3))
    assert not same.any()
    assert none == 0


def test_tsne_separates_two_clouds_and_repeats():
    pytest.importorskip("sklearn")
    points = torch.cat((random(15, 4), random(15, 4, seed=1) + 50))
    plane = tsne_plane(points)
    assert torch.equal(plane, tsne_plane(points))
    first, second = plane[:15], plane[15:]
    apart = (first.mean(0) - second.mean(0)).norm()
    assert apart > 2 * max((first - first.mean(0)).norm(dim=1).max(), (second - second.mean(0)).norm(dim=1).max())


def test_tsne_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        tsne_plane(random(9, 3))
