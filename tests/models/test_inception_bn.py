import pytest
import timm
import torch
from torch import nn

from nst_det.models import (
    Bottomup,
    Card,
    LevelInfo,
    count_parameters,
    create_model,
    feature_levels,
    forward_outputs,
    input_contract,
    load_into,
    prove_parity,
    save_backbone,
)
from nst_det.models.inception_bn import Inception, InceptionBN, Widths

# The article's table with the published weights' widths: name, input channels, output channels,
# 1x1, 3x3 reduce, 3x3, double 3x3 reduce, double 3x3, projection behind the pool
TABLE = """
    3a   192  256   64   64   64   64   96   32
    3b   256  320   64   64   96   64   96   64
    3c   320  576    0  128  160   64   96    0
    4a   576  576  224   64   96   96  128  128
    4b   576  576  192   96  128   96  128  128
    4c   576  608  160  128  160  128  160  128
    4d   608  608   96  128  192  160  192  128
    4e   608 1056    0  128  192  192  256    0
    5a  1056 1024  352  192  320  160  224  128
    5b  1024 1024  352  192  320  192  224  128
"""
ROWS = {name: tuple(map(int, rest)) for name, *rest in (line.split() for line in TABLE.strip().splitlines())}
# of the network with biases in its convolutions, as published for Caffe and PyTorch
PUBLISHED_PARAMETERS = 11_295_240


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("inception_bn", 1000).eval()


def convolutions(channels, single, reduce, conv, double_reduce, double, project):
    """(input, output, kernel) of every convolution of a block."""
    found = [(channels, reduce, 1), (reduce, conv, 3)]
    found += [(channels, double_reduce, 1), (double_reduce, double, 3), (double, double, 3)]
    return found + [(channels, width, 1) for width in (single, project) if width]


def test_parameters_are_those_of_the_table(model):
    all_of_them = [(3, 64, 7), (64, 64, 1), (64, 192, 3)]
    for channels, _, *widths in ROWS.values():
        all_of_them += convolutions(channels, *widths)
    weights = sum(inputs * outputs * kernel**2 for inputs, outputs, kernel in all_of_them)
    outputs = sum(width for _, width, _ in all_of_them)
    classifier = 1024 * 1000 + 1000
    assert count_parameters(model) == weights + 2 * outputs + classifier == 11_285_224
    assert count_parameters(model) + outputs == PUBLISHED_PARAMETERS
    conv = model.blocks["5b"].branches[1][1].conv
    assert conv.weight.std().item() == pytest.approx((2 / (192 * 9)) ** 0.5, rel=0.01)
    assert model.fc.weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {2e-5}


def test_every_block_has_the_tables_channels_and_size(model):
    seen = {}
    hooks = [
        block.register_forward_hook(lambda _m, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
        for name, block in model.blocks.items()
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    side = {"3": 28, "4": 14, "5": 7} | {"3c": 14, "4e": 7}
    for name, (inputs, outputs, *_) in ROWS.items():
        before, after = seen[name]
        assert before.shape[1] == inputs
        assert tuple(after.shape) == (1, outputs, *[side.get(name, side[name[0]])] * 2)
    assert tuple(seen["conv1"][1].shape) == (1, 64, 112, 112)
    assert tuple(seen["conv2"][1].shape) == (1, 192, 56, 56)
    maxima = [name for name, block in model.blocks.items() if any(type(m) is nn.MaxPool2d for m in block.modules())]
    assert maxima == ["3c", "4e", "5b"]


def test_levels(model):
    assert feature_levels(model) == {
        "res2": LevelInfo(1, 4, 192),
        "res3": LevelInfo(2, 8, 320),
        "res4": LevelInfo(3, 16, 608),
        "res5": LevelInfo(4, 32, 1024),
    }
    assert feature_levels(create_model("inception_bn", 10, stride16_tap="4b"))["res4"] == LevelInfo(3, 16, 576)
    assert [info["num_chs"] for info in model.feature_info] == [64, 192, 320, 608, 1024]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("size", [(97, 161), (33, 64)])
def test_odd_sizes_are_rounded_up_at_every_stride(model, size):
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, 3, *size), intermediates_only=True)
    for power, map_ in enumerate(maps, start=1):
        assert tuple(map_.shape[2:]) == tuple(-(-side // 2**power) for side in size)


def test_one_block_is_its_branches_by_hand():
    torch.manual_seed(1)
    block = Inception(5, Widths(reduce=3, conv=4, double_reduce=2, double=6, single=7, pool="avg", project=8)).eval()
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)

    def conv(layer, x, relu):
        y = nn.functional.conv2d(x, layer.conv.weight, padding=layer.conv.weight.shape[-1] // 2)
        mean, var = (value[:, None, None] for value in (layer.bn.running_mean, layer.bn.running_var))
        y = (y - mean) / (var + 2e-5).sqrt() * layer.bn.weight[:, None, None] + layer.bn.bias[:, None, None]
        return y.clamp(min=0) if relu else y

    single, three, double, pooled = block.branches
    x = torch.randn(2, 5, 6, 6)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    # nine cells always, those of the border too
    mean = sum(padded[..., i : i + 6, j : j + 6] for i in range(3) for j in range(3)) / 9
    expected = [
        conv(single[0], x, False),
        conv(three[1], conv(three[0], x, True), False),
        conv(double[2], conv(double[1], conv(double[0], x, True), True), False),
        conv(pooled[1], mean, False),
    ]
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.cat(expected, 1))


def test_maps_before_and_after_the_activation():
    torch.manual_seed(2)
    images = torch.randn(2, 3, 64, 64)
    after = create_model("inception_bn", 10).eval()
    before = create_model("inception_bn", 10, pre_activation_taps=True).eval()
    last = create_model("inception_bn", 10, pre_activation_taps=["5b"]).eval()
    for other in (before, last):
        other.load_state_dict(after.state_dict())
    with torch.no_grad():
        final, maps = after.forward_intermediates(images)
        same, raw = before.forward_intermediates(images)
        mixed = last.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(before(images), after(images), rtol=0, atol=0)
    assert torch.equal(final, maps[-1])
    assert torch.equal(same, final)
    for map_, pre in zip(maps, raw):
        assert torch.equal(pre.relu(), map_)
    assert all((pre < 0).any() for pre in raw)
    assert all(torch.equal(*pair) for pair in zip(mixed[:-1], maps[:-1]))
    assert torch.equal(mixed[-1], raw[-1])


def test_intermediates_by_timms_rules(model):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        assert len(maps) == 5
        assert torch.equal(final, model.forward_features(images))
        for indices, kept in ((2, [3, 4]), ([1, 3], [1, 3]), ([-1], [4])):
            for stop_early in (False, True):
                some = model.forward_intermediates(images, indices, stop_early=stop_early, intermediates_only=True)
                assert [map_.shape[1] for map_ in some] == [maps[index].shape[1] for index in kept]
                assert all(torch.equal(map_, maps[index]) for map_, index in zip(some, kept))
        with pytest.raises(AssertionError, match="NCHW"):
            model.forward_intermediates(images, output_fmt="NLC")
        outputs = forward_outputs(model, images, feature_levels(model))
        assert torch.equal(outputs.logits, model(images))
        assert torch.equal(outputs.embedding, final.mean((2, 3)))
        assert torch.equal(model.forward_head(final, pre_logits=True), final.mean((2, 3)))
        getter = timm.create_model("inception_bn", features_only=True, out_indices=(2, 3)).eval()
        assert [tuple(map_.shape[1:]) for map_ in getter(images)] == [(320, 8, 8), (608, 4, 4)]


def test_pruning_leaves_the_maps_and_what_they_need():
    images = torch.randn(1, 3, 64, 64)
    model = create_model("inception_bn", 10, stride16_tap="4b").eval()
    with torch.no_grad():
        whole = model.forward_intermediates(images, [2, 3], intermediates_only=True)
        assert model.prune_intermediate_layers([2, 3]) == [2, 3]
        pruned = model.forward_intermediates(images, [2, 3], intermediates_only=True)
    assert list(model.blocks) == ["conv1", "conv2", "3a", "3b", "3c", "4a", "4b"]
    assert all(torch.equal(*pair) for pair in zip(whole, pruned))
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_features == 576
    whole_but_head = create_model("inception_bn", 10)
    whole_but_head.prune_intermediate_layers([4], prune_head=False)
    assert whole_but_head.get_classifier().out_features == 10


def test_a_new_classifier_and_other_images():
    model = InceptionBN(num_classes=3, in_chans=1).eval()
    assert tuple(model(torch.zeros(2, 1, 32, 32)).shape) == (2, 3)
    model.reset_classifier(7)
    assert tuple(model(torch.zeros(2, 1, 32, 32)).shape) == (2, 7)
    model.reset_classifier(0, "")
    assert tuple(model(torch.zeros(2, 1, 32, 32)).shape) == (2, 1024, 1, 1)


def test_every_parameter_gets_a_gradient_where_taps_are_before_the_activation():
    model = create_model("inception_bn", 4, pre_activation_taps=True)
    final, maps = model.forward_intermediates(torch.randn(2, 3, 64, 64))
    (model.forward_head(final).square().sum() + maps[-1].square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"stride16_tap": "4b", "pre_activation_taps": ["5b"]}])
def test_the_detector_starts_from_what_stage_one_trained(tmp_path, kwargs):
    torch.manual_seed(3)
    model = create_model("inception_bn", 5, **kwargs)
    contract = input_contract([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "RGB", 64)
    path = tmp_path / "student.safetensors"
    card = Card(arch="inception_bn", num_classes=5, arch_kwargs=kwargs, classes=list("abcde"), input=contract)
    save_backbone(path, model, card)
    assert prove_parity(path) == 0.0
    bottomup = Bottomup("inception_bn", ["res4"], kwargs)
    assert load_into(bottomup, path).arch == "inception_bn"
    assert bottomup.channels == {"res4": 576 if kwargs else 608}
    bottomup.freeze(2)
    frozen = {name.split(".")[2] for name, value in bottomup.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "conv2"}
