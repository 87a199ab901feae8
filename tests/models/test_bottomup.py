import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nst_det.models import LEVELS, Bottomup, create_model, feature_levels, forward_outputs
from nst_det.models.build import batch_norms

ARCHS = ["nst_resnet10_w32", "resnet18", "mobilenetv3_large_100", "efficientnet_b0", "convnext_atto", "resnetv2_50"]


def classifier_and_bottomup(arch, levels=None, **kwargs):
    model = create_model(arch, 5).eval()
    with torch.no_grad():
        # away from the identity, so that batch normalization matters
        for _, layer in batch_norms(model):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            layer.weight.uniform_(0.5, 2)
    names = levels or list(feature_levels(model))
    return model, Bottomup(arch, names, state_dict=model.state_dict(), num_classes=5, **kwargs)


@pytest.mark.parametrize("arch", ARCHS)
def test_maps_are_the_classifiers_and_every_parameter_is_used(arch):
    model, bottomup = classifier_and_bottomup(arch)
    images = torch.randn(2, 3, 64, 64)
    maps = bottomup.eval()(images)
    wanted = forward_outputs(model, images, feature_levels(model)).maps
    assert list(maps) == list(wanted) == list(bottomup.channels)
    assert all(torch.equal(maps[name], wanted[name]) for name in wanted)
    sum(m.sum() for m in maps.values()).backward()
    assert [name for name, parameter in bottomup.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("arch", "levels"),
    # of the last, all that is above res2 but the network's own norm
    [("hrnet_w18_small", ["res2"]), ("hrnet_w18_small", ["res3", "res4"]), ("crossvit_tiny_240", ["res4"])],
)
def test_what_gives_nothing_to_the_levels_is_frozen_and_named(arch, levels, caplog):
    caplog.set_level("INFO")
    bottomup = Bottomup(arch, levels)
    side = 240 if arch.startswith("crossvit") else 64
    sum(map_.square().sum() for map_ in bottomup.train()(torch.randn(2, 3, side, side)).values()).backward()
    without = [name for name, parameter in bottomup.named_parameters() if parameter.grad is None]
    assert without
    assert without == [name for name, parameter in bottomup.named_parameters() if not parameter.requires_grad]
    assert sorted(without) == bottomup.unused
    assert f"{len(without)} of" in caplog.text
    assert bottomup.unused[0] in caplog.text


# the padding of images, and what the line names
@pytest.mark.parametrize(
    ("arch", "kwargs", "multiple", "named"),
    [
        ("inception_v3", {}, 1, "res2 .*193 x 257 pixels has 44 x 60.* 49 x 65"),
        ("inception_v3", {}, 32, "res2 .*192 x 256 pixels has 44 x 60.* 48 x 64"),
        # it scales every image to its own size
        ("crossvit_tiny_240", {}, 16, "res4 .*14 x 14"),
        ("hiera_tiny_224", {}, 32, "192 x 256"),
        ("swin_tiny_patch4_window7_224", {}, 32, "192 x 256 .*224.*KWARGS.strict_img_size"),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, 1, "193 x 257"),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, 32, None),
        # maps of an odd size don't meet in it
        ("hrnet_w18_small", {}, 1, "193 x 257"),
        ("hrnet_w18_small", {}, 32, None),
        # rounds sizes down, the others up
        ("convnext_atto", {}, 1, None),
        ("resnet18", {}, 1, None),
        ("mobilenetv3_small_050", {}, 1, None),
    ],
)
def test_maps_of_any_image_have_the_size_that_their_stride_says(arch, kwargs, multiple, named):
    bottomup = Bottomup(arch, ["res4"] if arch.startswith("crossvit") else LEVELS, kwargs)
    with nullcontext() if named is None else pytest.raises(ValueError, match=f"^{arch}.*{named}"):
        bottomup.check_map_sizes(multiple)


def test_layers_above_the_highest_level_are_gone():
    _, bottomup = classifier_and_bottomup("nst_resnet10_w32", ["res3", "res4"])
    assert bottomup.channels == {"res3": 64, "res4": 128}
    assert bottomup.strides == {"res3": 8, "res4": 16}
    assert not any(key.startswith(("model.layer4", "model.fc")) for key in bottomup.state_dict())


# timm's layer with a built-in activation in the second; drop path and dropout are off in its maps
@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0"])
def test_frozen_batch_norm_keeps_names_and_equals_evaluation(arch):
    model, bottomup = classifier_and_bottomup(arch)
    before = copy.deepcopy(bottomup.state_dict())
    bottomup.set_norm("frozen")
    images = torch.randn(4, 3, 64, 64)
    maps = bottomup.train()(images)
    wanted = forward_outputs(model, images, feature_levels(model)).maps
    assert all(torch.equal(maps[name], wanted[name]) for name in maps)
    after = bottomup.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    norms = dict(batch_norms(bottomup))
    assert norms
    assert not any(p.requires_grad for layer in norms.values() for p in layer.parameters())
    assert any(p.requires_grad for p in bottomup.parameters())


def test_sync_keeps_names_and_values():
    _, bottomup = classifier_and_bottomup("resnet18")
    before = copy.deepcopy(bottomup.state_dict())
    bottomup.set_norm("sync")
    assert all(isinstance(layer, nn.SyncBatchNorm) for _, layer in batch_norms(bottomup))
    after = bottomup.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("at", "frozen"),
    [
        (0, set()),
        (1, {"conv1", "bn1"}),
        (2, {"conv1", "bn1", "layer1"}),
        (4, {"conv1", "bn1", "layer1", "layer2", "layer3"}),
        (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_freezing_a_resnet_by_detectron2s_numbers(at, frozen):
    _, bottomup = classifier_and_bottomup("resnet18")
    bottomup.freeze(at)
    bottomup.train()
    found = {name.split(".")[1] for name, p in bottomup.named_parameters() if not p.requires_grad}
    assert found == frozen
    still = {name.split(".")[1] for name, layer in batch_norms(bottomup) if not layer.training}
    assert still == frozen - {"conv1"}


def test_freezing_finds_the_layers_of_a_network_without_stage_names():
    _, bottomup = classifier_and_bottomup("mobilenetv3_large_100")
    bottomup.freeze(2)
    frozen = {name for name, p in bottomup.named_parameters() if not p.requires_grad}
    names, parameters = zip(*bottomup.eval().requires_grad_(True).named_parameters())
    maps = bottomup(torch.randn(1, 3, 64, 64))
    grads = torch.autograd.grad(maps["res2"].sum(), parameters, allow_unused=True)
    assert frozen == {name for name, grad in zip(names, grads) if grad is not None}


@pytest.mark.parametrize(
    ("arch", "use", "named"),
    [
        ("convnext_atto", lambda bottomup: bottomup.freeze(1), "convnext_atto.*stride 2"),
        ("nst_resnet10_w32", lambda bottomup: bottomup.freeze(6), "6"),
        ("nst_resnet10_w32", lambda bottomup: bottomup.set_norm("group"), "'group'.*frozen, train or sync"),
        ("nst_resnet10_w32", lambda bottomup: Bottomup(bottomup.arch, ["p3"]), "'p3'.*res2, res3, res4, res5"),
    ],
)
def test_what_cannot_be_asked(arch, use, named):
    with pytest.raises(ValueError, match=named):
        use(classifier_and_bottomup(arch)[1])


def test_random_layers_are_not_frozen_unasked():
    bottomup = Bottomup("nst_resnet10_w32")
    with pytest.raises(ValueError, match="freezing at 2 would freeze layers with random weights: bn1.bias,"):
        bottomup.freeze(2)
    with pytest.raises(ValueError, match="freezing batch normalization would freeze layers with random weights"):
        bottomup.set_norm("frozen")
    assert all(parameter.requires_grad for parameter in bottomup.parameters())
    bottomup.freeze(2, allow_random=True)
    assert not bottomup.model.conv1.weight.requires_grad


def test_weights_that_dont_fit_are_named_and_nothing_is_copied():
    model, bottomup = classifier_and_bottomup("nst_resnet10_w32")
    state = {key: torch.full_like(value, 3) for key, value in model.state_dict().items()}
    before = copy.deepcopy(bottomup.state_dict())
    cases = [
        ({k: v for k, v in state.items() if k != "conv1.weight"}, r"f: .*1 missing \(conv1.weight\)"),
        ({**state, "rpn.conv.weight": torch.zeros(1)}, r"1 unexpected \(rpn.conv.weight\)"),
        ({**state, "conv1.weight": torch.zeros(2, 3, 7, 7)}, r"1 other shapes \(conv1.weight 2x3x7x7 for 32x3x3x3\)"),
        ({f"module.{k}": v for k, v in state.items()}, "and [0-9]+ more"),
    ]
    for wrong, says in cases:
        with pytest.raises(ValueError, match=says) as caught:
            bottomup.load_classifier(wrong, "f")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700
    after = bottomup.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
