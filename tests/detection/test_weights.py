"""Weights of backbones and of whole detectors."""

import pickle

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from nst_det.detection.checkpoint import load_weights, save_weights, saved_classes
from nst_det.detection.torchvision import build_detector
from nst_det.errors import UserError
from nst_det.models import Card, create_model, input_contract, save_backbone
from tests.helpers.detection import same_bits
from tests.helpers.hub import REPO, offline_cache, snapshot, weights

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLASSES = ["a", "b", "c"]


@pytest.fixture
def backbone(tmp_path):
    """A backbone file with random weights; returns its path and the classifier."""

    def make(arch="nst_resnet10_w32", order="RGB"):
        torch.manual_seed(5)
        model = create_model(arch, 7)
        path = tmp_path / "student-kd-s0.safetensors"
        save_backbone(path, model, Card(arch, 7, method="kd", input=input_contract(MEAN, STD, order, 64)))
        return path, model

    return make


def test_a_backbone_fills_the_bottom_up_alone(small, backbone, monkeypatch):
    path, model = backbone()
    monkeypatch.setenv("NST_DET_BACKBONES", str(path.parent))
    classifier = model.state_dict()
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for name in (str(path), "backbone://student-kd-s0"):
        config = small({"MODEL.WEIGHTS": name})
        detector, fresh = build_detector(config), build_detector(config)
        assert load_weights(detector, config) == "backbone"
        for key, value in detector.state_dict().items():
            below = key.startswith("backbone.bottom_up.")
            expected = classifier[key.removeprefix("backbone.bottom_up.model.")] if below else fresh.state_dict()[key]
            assert torch.equal(value, expected)
        detector.freeze(2, "FrozenBN")
        # it computes what the classifier computes
        pixels, _ = detector.preprocess([image])
        with torch.no_grad():
            maps = detector.eval().backbone.bottom_up(pixels)
            taps = model.eval().forward_intermediates((image / 255 - mean)[None] / std, intermediates_only=True)
        assert torch.allclose(maps["res5"], taps[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("given", "changes", "named"),
    [
        ({"order": "BGR"}, {}, "INPUT.FORMAT BGR"),
        ({}, {"MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0]}, r"MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"),
        ({"arch": "nst_resnet18_w48"}, {}, "student-kd-s0.*nst_resnet18_w48.*nst_resnet10_w32"),
    ],
)
def test_a_backbone_that_doesnt_fit_is_one_line(small, backbone, given, changes, named):
    path, _ = backbone(**given)
    config = small({"MODEL.WEIGHTS": str(path), **changes})
    with pytest.raises(UserError, match=named):
        load_weights(build_detector(config), config)


@pytest.mark.parametrize(("arch", "name"), [("resnet18", "resnet18"), ("mobilenetv2_100", "mobilenet_v2")])
def test_a_classifier_from_elsewhere_fills_the_bottom_up(small, tmp_path, arch, name, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)().eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    keys = {"MODEL.TIMM.ARCH": arch, "MODEL.WEIGHTS": str(tmp_path / "theirs.pth")}
    detector = build_detector(small(keys))
    assert load_weights(detector, small(keys)) == "backbone"
    assert "1000 classes" in caplog.text
    detector.freeze(2, "FrozenBN")
    images, seen = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), []
    last = theirs.layer4 if arch == "resnet18" else theirs.features[-2]
    last.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    with torch.no_grad():
        theirs(images)
        maps = detector.eval().backbone.bottom_up(images)
    torch.testing.assert_close(maps["res5"], seen[0], rtol=1e-5, atol=1e-5)
    # a resnet's file may be anybody's, and images are asked for; torchvision's others are known to want ImageNet's
    assert ("MODEL.PIXEL_STD" in caplog.text) == (arch == "resnet18")
    config = small({**keys, "MODEL.PIXEL_STD": [1.0, 1.0, 1.0]})
    if arch == "resnet18":
        load_weights(build_detector(config), config)
        assert "MODEL.PIXEL_STD" in caplog.text
    else:
        with pytest.raises(UserError, match=r"theirs\.pth.*MODEL\.PIXEL_STD"):
            load_weights(build_detector(config), config)


def test_a_published_name_fills_the_bottom_up(small, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    theirs = weights(snapshot(offline_cache(tmp_path, monkeypatch)) / "model.safetensors")
    keys = {"MODEL.TIMM.ARCH": "test_resnet", "MODEL.WEIGHTS": REPO}
    # its images are not ImageNet's
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS.*MODEL\.PIXEL_MEAN \[127\.5, 127\.5, 127\.5\]"):
        load_weights(build_detector(small(keys)), small(keys))
    config = small(keys | {"MODEL.PIXEL_MEAN": [127.5] * 3, "MODEL.PIXEL_STD": [127.5] * 3})
    detector = build_detector(config)
    assert load_weights(detector, config) == "backbone"
    assert REPO in caplog.text
    for name, value in detector.backbone.bottom_up.model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


@pytest.fixture
def written(small, talkative, tmp_path):
    """A detector, its file, and the config that names it."""
    path, detector = tmp_path / "model.safetensors", talkative()
    save_weights(path, detector, CLASSES)
    return detector, path, small({"MODEL.WEIGHTS": str(path)})


def test_a_detector_comes_back_to_the_bit(small, tmp_path, written):
    detector, path, config = written
    assert saved_classes(path) == CLASSES
    # without a checksum, and in the form of Detectron2's checkpoints
    save_file(detector.state_dict(), tmp_path / "plain.safetensors", {"classes": '["a", "b", "c"]'})
    torch.save({"model": detector.state_dict(), "iteration": 3}, tmp_path / "model_final.pth")
    for file in (path, tmp_path / "plain.safetensors", tmp_path / "model_final.pth"):
        config = small({"MODEL.WEIGHTS": str(file)})
        other = build_detector(config, seed=9)
        assert load_weights(other, config, CLASSES) == "detector"
        assert same_bits(detector.state_dict(), other.state_dict())
        assert other.backbone.bottom_up.loaded
    assert load_weights(build_detector(small()), small()) == "random"


def test_a_flipped_bit_is_found_wherever_it_is(written):
    _, path, config = written
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (whole.index(b'\\"b\\"') + 2, start, start + (len(whole) - start) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged .*SHA-256"):
            load_weights(build_detector(config), config)


def test_whole_or_not_at_all(small, written):
    _, path, config = written
    with pytest.raises(UserError, match="MODEL.WEIGHTS: .*model.safetensors .*a, b, c.*c, b, a"):
        load_weights(build_detector(config), config, CLASSES[::-1])
    config = small({"MODEL.WEIGHTS": str(path), "MODEL.ROI_HEADS.NUM_CLASSES": 4})
    detector, same = build_detector(config), build_detector(config)
    with pytest.raises(UserError, match="MODEL.WEIGHTS: .*4 other shapes.*cls_score.weight 4x32 for 5x32"):
        load_weights(detector, config)
    assert same_bits(detector.state_dict(), same.state_dict())


@pytest.mark.parametrize(
    ("classes", "saved"),
    [
        (["a", "b", "c", "d"], "model.safetensors"),
        (["a", "b"], "model.safetensors"),
        # as many, but others
        (["a", "b", "x"], "model.safetensors"),
        # a file without names
        (["a", "b"], "plain.pth"),
    ],
)
def test_for_other_classes_all_but_the_predictor_is_filled(small, written, classes, saved, caplog):
    caplog.set_level("INFO")
    detector, path, _ = written
    torch.save(detector.state_dict(), path.parent / "plain.pth")
    config = small({"MODEL.WEIGHTS": str(path.parent / saved), "MODEL.ROI_HEADS.NUM_CLASSES": len(classes)})
    other, fresh = build_detector(config), build_detector(config)
    assert load_weights(other, config, classes, starts=True) == "detector"
    for name, value in other.state_dict().items():
        expected = fresh if "box_predictor" in name else detector
        assert torch.equal(value, expected.state_dict()[name]), name
    assert f"{saved}: trained on" in caplog.text
    # what is to be evaluated is whole, and the order of classes is no other class
    with pytest.raises(UserError, match=saved):
        load_weights(build_detector(config), config, classes)
    if saved == path.name:
        with pytest.raises(UserError, match=r"DATASETS.CLASSES to \[a, b, c\]"):
            load_weights(build_detector(config), config, CLASSES[::-1], starts=True)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("nothing.safetensors", None, "no such weights file"),
        ("nothing.pth", None, "no such weights file"),
        ("R-50.pkl", pickle.dumps({"model": {}}), "R-50.pkl: .*--trust-pickle"),
        ("model.safetensors", b"not weights at all", "model.safetensors: damaged"),
    ],
)
def test_a_file_that_cant_be_used(small, tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    config = small({"MODEL.WEIGHTS": str(tmp_path / name)})
    with pytest.raises(UserError, match=named):
        load_weights(build_detector(config), config)
    if name.endswith(".safetensors"):
        with pytest.raises(UserError, match=name):
            saved_classes(tmp_path / name)
