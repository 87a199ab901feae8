import pytest
import torch
from torch.testing import assert_close

from nst_det.losses import products

# over and under the size from which oneDNN is asked
SHAPES = [(2, 160, 300, 170), (1, 96, 4000, 96), (3, 8, 30, 5)]


def close(actual, expected):
    # entries are sums of up to 4000 terms of size 1
    assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("images", "m", "k", "n"), SHAPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
def test_product_is_the_product(images, m, k, n, layout):
    left, right = torch.randn(images, m, k), torch.randn(images, n, k)
    if layout == "columns":
        left, right = (x.mT.contiguous().mT for x in (left, right))
    if layout == "gaps":
        left, right = (torch.cat([x, x], 2)[:, :, :k] for x in (left, right))
    expected = left.double() @ right.double().mT
    close(products.product(left, right), expected)
    # also among the columns of a larger tensor
    among = torch.full((images, m, n + 3), torch.nan)
    products.product(left, right, among[:, :, :n])
    close(among[:, :, :n], expected)
    assert among[:, :, n:].isnan().all()
    minus = torch.randn(images, m, n)
    close(products.product_minus(left, right, 0.25, minus), expected / 4 - minus.double())


@pytest.mark.parametrize(("channels", "positions"), [(40, 500), (100, 700), (260, 300), (260, 90)])
def test_gram_is_the_product_with_itself(channels, positions):
    x = torch.randn(2, channels, positions)
    found = products.gram(x)
    close(found, x.double() @ x.double().mT)
    assert torch.equal(found, found.mT) or channels > positions
    among = torch.zeros(2, channels, channels + 5)
    products.gram(x, among[:, :, :channels])
    assert torch.equal(among[:, :, :channels], found)
    assert not among[:, :, channels:].any()


@pytest.mark.parametrize(("s", "t", "n"), [(64, 128, 3000), (64, 32, 5001), (128, 96, 200), (6, 4, 50)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sum_of_products(s, t, n, channels_last):
    weights = torch.randn(2, s, s + t)
    maps = [torch.randn(2, c, n) for c in (s, t)]
    if channels_last:
        maps = [x.mT.contiguous().mT for x in maps]
    out = torch.full((2, s, n), torch.nan)
    products.sum_of_products(weights, maps[0], maps[1], out)
    close(out, weights.double() @ torch.cat(maps, 1).double())


@pytest.fixture
def calls(monkeypatch):
    seen = []
    real = products._onednn

    def spy(left, right):
        seen.append((left.shape, right.shape))
        return real(left, right)

    products._has_onednn()
    monkeypatch.setattr(products, "_onednn", spy)
    return seen


@pytest.mark.skipif(not products._has_onednn(), reason="this torch has no oneDNN product")
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_only_large_packed_float32_products_go_to_onednn(calls):
    large = torch.randn(2, 160, 300)
    products.product(large, large)
    assert len(calls) == 2
    calls.clear()
    products.product(large[:, :8], large)
    products.product(large.double(), large.double())
    products.product(torch.cat([large, large], 2)[:, :, :300], large)
    with torch.backends.mkldnn.flags(enabled=False):
        products.product(large, large)
    assert calls == []


def test_an_operator_that_has_changed_is_not_used(monkeypatch):
    def changed(left, right):
        raise TypeError("other arguments")

    monkeypatch.setattr(products, "_onednn", changed)
    products._has_onednn.cache_clear()
    try:
        assert not products._has_onednn()
        large = torch.randn(2, 160, 300)
        close(products.product(large, large), large.double() @ large.double().mT)
    finally:
        products._has_onednn.cache_clear()
