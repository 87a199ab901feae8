"""Weights of other programs compute in this one's models what they compute in theirs."""

import pickle
import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from nst_det.errors import UserError
from nst_det.models import Bottomup, create_model, recognize
from nst_det.models.bottomup import load_recognized
from nst_det.models.convert import resnet_to_detectron2
from nst_det.models.io import trusting_pickles

LITE = "tf_efficientnet_lite0"


def lived(model):
    """Draw statistics and scales that no layer begins with."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.weight.data, layer.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


def renamed(state_dict, *rules):
    """Rename by the first rule (pattern, replacement) that fits."""
    found = {}
    for name, value in state_dict.items():
        rule = next(rule for rule in rules if re.match(rule[0], name))
        found[re.sub(*rule, name)] = value
    return found


def by_lukemelas(state_dict):
    """Names as in the EfficientNets of lukemelas: blocks numbered through, norms 0 to 2."""
    starts, found = {}, {}
    for name in state_dict:
        if match := re.match(r"blocks\.(\d+)\.(\d+)\.", name):
            starts.setdefault(match[0], len(starts))
    inner = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    inner |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    for name, value in state_dict.items():
        if match := re.match(r"(blocks\.(\d+)\.\d+\.)(\w+)\.(\w+)", name):
            layers = first if match[2] == "0" else inner
            found[f"_blocks.{starts[match[1]]}.{layers[match[3]]}.{match[4]}"] = value
        else:
            layer, _, entry = name.partition(".")
            found[f"{outer[layer]}.{entry}"] = value
    return found


def by_convnexts_authors(state_dict):
    return renamed(
        state_dict,
        (r"stem\.(\d)\.", r"downsample_layers.0.\1."),
        (r"stages\.(\d)\.downsample\.(\d)\.", r"downsample_layers.\1.\2."),
        (r"stages\.(\d)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
        (r"stages\.(\d)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
        (r"stages\.(\d)\.blocks\.(\d+)\.", r"stages.\1.\2."),
        (r"head\.norm\.", "norm."),
        (r"head\.fc\.", "head."),
    )


def of_timm(arch):
    return lambda: lived(timm.create_model(arch, num_classes=7))


def of_torchvision(name):
    return lambda: lived(getattr(torchvision.models, name)(num_classes=7))


def behind(prefix, head=""):
    """Names behind a prefix, and those of the head behind its own."""
    return lambda state: {
        "state_dict": {(head or prefix if name.startswith("fc.") else prefix) + name: state[name] for name in state}
    }


def by_detectron2(state):
    """As its own files: arrays in a pickle, which weights_only doesn't open."""
    return {"model": {name: value.numpy() for name, value in resnet_to_detectron2(state).items()}}


# what a file of the architecture is named by
ORIGINS = {
    **dict.fromkeys(
        ("timm", "torchvision-resnet", "data-parallel", "compiled", "average", "mmpretrain"), "timm or torchvision"
    ),
    "average-of-torch": "timm or torchvision",
    "whole-module": "timm or torchvision",
    "lightning": "timm or torchvision",
    "detectron2": "Detectron2",
    "lukemelas": "lukemelas",
    "convnext": "authors'",
}


# architecture asked for, whose network it is, what its file holds, whether the head is among that
SOURCES = {
    "timm": ("resnet18", of_timm("resnet18"), dict, True),
    "torchvision-resnet": ("resnet18", of_torchvision("resnet18"), dict, True),
    "torchvision-mobilenet2": ("mobilenetv2_100", of_torchvision("mobilenet_v2"), dict, True),
    "torchvision-mobilenet3": ("mobilenetv3_small_100", of_torchvision("mobilenet_v3_small"), dict, True),
    "torchvision-efficientnet": ("efficientnet_b0", of_torchvision("efficientnet_b0"), dict, True),
    "torchvision-mnasnet": ("mnasnet_100", of_torchvision("mnasnet1_0"), dict, True),
    "torchvision-convnext": ("convnext_tiny", of_torchvision("convnext_tiny"), dict, True),
    "data-parallel": (
        "resnet18",
        of_torchvision("resnet18"),
        behind("module."),
        True,
    ),
    "compiled": ("resnet18", of_timm("resnet18"), behind("_orig_mod."), True),
    "average": (
        "resnet18",
        of_timm("resnet18"),
        lambda state: {"state_dict": {n: torch.zeros_like(v) for n, v in state.items()}, "state_dict_ema": dict(state)},
        True,
    ),
    "average-of-torch": (
        "resnet18",
        of_torchvision("resnet18"),
        lambda state: {
            "model": {"old": 1},
            "ema": behind("module.")(state)["state_dict"] | {"n_averaged": torch.tensor(3)},
        },
        True,
    ),
    "whole-module": ("resnet18", of_torchvision("resnet18"), None, True),
    "lightning": (
        "resnet18",
        of_timm("resnet18"),
        lambda state: (
            behind("student.model.")(state) | {"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}
        ),
        True,
    ),
    "mmpretrain": ("resnet18", of_torchvision("resnet18"), behind("backbone.", "head."), False),
    "detectron2": ("resnet18", of_torchvision("resnet18"), by_detectron2, False),
    "lukemelas": (LITE, of_timm(LITE), by_lukemelas, True),
    "convnext": ("convnext_atto", of_timm("convnext_atto"), by_convnexts_authors, True),
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    arch, make, write, with_head = SOURCES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    theirs, path = make(), folder / ("theirs.pkl" if write is by_detectron2 else "theirs.pth")
    if write is by_detectron2:
        path.write_bytes(pickle.dumps(write(theirs.state_dict())))
    else:
        torch.save(write(theirs.state_dict()) if write else {"epoch": 3, "ema": theirs}, path)
    if write in (by_detectron2, None):
        with pytest.raises(UserError, match=r"theirs.*--trust-pickle"):
            recognize(path, arch, {}, 7)
    with trusting_pickles(write in (by_detectron2, None)):
        yield request.param, arch, theirs, path, with_head


def test_the_whole_classifier_computes_the_same(source):
    name, arch, theirs, path, with_head = source
    found = recognize(path, arch, {}, 7)
    assert (found.head is None) == with_head
    assert f"{ORIGINS.get(name, 'torchvision')} {arch}" in found.says
    model = create_model(arch, 7).eval()
    left = model.load_state_dict(found.tensors, strict=False)
    assert not left.unexpected_keys
    assert all(name.endswith("num_batches_tracked") or name.startswith("fc.") for name in left.missing_keys)
    if not with_head:
        model.get_classifier().load_state_dict(theirs.fc.state_dict())
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_a_bottom_up_takes_them_with_another_head(source):
    _, arch, _, path, _ = source
    whole = create_model(arch, 7).eval()
    whole.load_state_dict(recognize(path, arch, {}, 7).tensors, strict=False)
    bottom_up = Bottomup(arch, ["res3", "res4"]).eval()
    published = bottom_up.model.pretrained_cfg
    mean, std = ([255 * value for value in published[name]] for name in ("mean", "std"))
    load_recognized(bottom_up, path, mean, std, "RGB", "MODEL.WEIGHTS")
    assert bottom_up.loaded
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = whole.forward_intermediates(images, intermediates_only=True)
        for map_ in bottom_up(images).values():
            assert any(map_.shape == other.shape and torch.equal(map_, other) for other in maps)


def test_another_head_is_left_out_and_named(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "five.pth")
    found = recognize(tmp_path / "five.pth", "resnet18", {}, 3)
    assert found.head == 5
    assert not {"fc.weight", "fc.bias"} & {*found.tensors}
    assert "5" in found.says


def test_a_head_with_a_normalization_says_how_many_classes_it_has(tmp_path):
    torch.save(timm.create_model("levit_128s", num_classes=5).state_dict(), tmp_path / "five.pth")
    assert recognize(tmp_path / "five.pth", "levit_128s", {}, 3).head == 5


# what the file holds, of which network, the architecture asked for, and what the line names
REFUSED = {
    "bottlenecks": (resnet_to_detectron2, of_torchvision("resnet50"), "resnet50", "STRIDE_IN_1X1"),
    "unknown": (dict, of_torchvision("mobilenet_v2"), "mobilenetv4_conv_small", "torchvision"),
    "other-size": (dict, of_timm("resnet18"), "resnet34", "are of resnet18;|are of resnet18$"),
    "not-a-number": (
        lambda state: state | {"fc.bias": torch.full((7,), torch.nan)},
        of_timm("resnet18"),
        "resnet18",
        "fc.bias",
    ),
    "blocks-of-blocks": (resnet_to_detectron2, of_timm("resnet50"), "regnety_004", "regnety_004"),
    "other-network": (dict, of_timm("resnet18"), "mobilenetv2_100", "mobilenetv2_100"),
    "padding": (by_lukemelas, of_timm(LITE), "efficientnet_lite0", "tf_efficientnet"),
    "other-lite": (by_lukemelas, of_timm(LITE), "tf_efficientnet_lite2", f"are of {LITE}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, name):
    write, make, arch, named = REFUSED[name]
    torch.save(write(make().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth") as refused:
        recognize(tmp_path / "weights.pth", arch, {}, 7)
    assert re.search(named, str(refused.value))
    assert "\n" not in str(refused.value)
