import pickle

import pytest
import torch
from safetensors.torch import save_file

from nst_det.detection.checkpoint import load_weights, save_weights, saved_classes
from nst_det.detection.torchvision import build_detector
from nst_det.errors import UserError
from nst_det.models import Card, create_model, input_contract, save_backbone

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def backbone(tmp_path):
    """A backbone file with random weights; returns its path and the classifier."""

    def make(name="student-kd-s0", arch="nst_resnet10_w32", order="RGB", mean=MEAN):
        torch.manual_seed(5)
        model = create_model(arch, 7)
        path = tmp_path / f"{name}.safetensors"
        save_backbone(path, model, Card(arch, 7, method="kd", input=input_contract(mean, STD, order, 64)))
        return path, model

    return make


def test_a_backbone_file_fills_the_bottom_up_alone(small, backbone):
    path, model = backbone()
    config = small({"MODEL.WEIGHTS": str(path)})
    detector, fresh = build_detector(config), build_detector(config)
    assert load_weights(detector, config) == "backbone"
    classifier = model.state_dict()
    for name, value in detector.state_dict().items():
        if "bottom_up" in name:
            assert torch.equal(value, classifier[name.removeprefix("backbone.bottom_up.model.")])
        else:
            assert torch.equal(value, fresh.state_dict()[name])
    detector.freeze(2, "FrozenBN")


def test_a_backbone_by_name(small, backbone, monkeypatch):
    path, model = backbone()
    monkeypatch.setenv("NST_DET_BACKBONES", str(path.parent))
    config = small({"MODEL.WEIGHTS": "backbone://student-kd-s0"})
    detector = build_detector(config)
    assert load_weights(detector, config) == "backbone"
    assert torch.equal(detector.backbone.bottom_up.model.conv1.weight, model.conv1.weight)


def test_the_bottom_up_computes_what_the_classifier_computes(small, backbone):
    path, model = backbone()
    config = small({"MODEL.WEIGHTS": str(path)})
    detector = build_detector(config)
    load_weights(detector, config)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    pixels, _ = detector.preprocess([image])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        maps = detector.eval().backbone.bottom_up(pixels)
        expected = model.eval().forward_intermediates((image / 255 - mean)[None] / std, intermediates_only=True)
    assert torch.allclose(maps["res5"], expected[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("given", "changes", "line"),
    [
        ({"order": "BGR"}, {}, "the backbone was trained on BGR images, now they are RGB.*INPUT.FORMAT BGR"),
        ({}, {"MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0]}, r"trained with mean.*MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"),
        ({"arch": "nst_resnet18_w48"}, {}, "holds nst_resnet18_w48, the model is nst_resnet10_w32"),
    ],
)
def test_a_backbone_that_doesnt_fit_is_one_line(small, backbone, given, changes, line):
    path, _ = backbone(**given)
    config = small({"MODEL.WEIGHTS": str(path), **changes})
    with pytest.raises(UserError, match=line):
        load_weights(build_detector(config), config)


def test_a_detector_comes_back_to_the_bit(small, tmp_path, talkative):
    path = tmp_path / "model.safetensors"
    detector = talkative()
    save_weights(path, detector, ["a", "b", "c"])
    assert saved_classes(path) == ["a", "b", "c"]
    config = small({"MODEL.WEIGHTS": str(path)})
    other = build_detector(config, seed=9)
    assert load_weights(other, config, ["a", "b", "c"]) == "detector"
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in detector.state_dict().items())
    assert other.backbone.bottom_up.loaded


def test_a_flipped_bit_is_found_wherever_it_is(small, tmp_path, talkative):
    path = tmp_path / "model.safetensors"
    save_weights(path, talkative(), ["a", "b", "c"])
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (whole.index(b'\\"b\\"') + 2, start, start + (len(whole) - start) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        config = small({"MODEL.WEIGHTS": str(path)})
        with pytest.raises(
            UserError, match=r"model\.safetensors: damaged .*SHA-256 differs\); get it again, or remove"
        ):
            load_weights(build_detector(config), config)


def test_weights_without_a_checksum_are_taken(small, tmp_path, talkative):
    path = tmp_path / "model.safetensors"
    save_file(talkative().state_dict(), path, {"classes": '["a", "b", "c"]'})
    config = small({"MODEL.WEIGHTS": str(path)})
    assert load_weights(build_detector(config), config, ["a", "b", "c"]) == "detector"


def test_a_checkpoint_in_detectron2s_form(small, tmp_path, talkative):
    path = tmp_path / "model_final.pth"
    torch.save({"model": talkative().state_dict(), "iteration": 3}, path)
    config = small({"MODEL.WEIGHTS": str(path)})
    assert load_weights(build_detector(config), config) == "detector"


def test_whole_or_not_at_all(small, tmp_path, talkative):
    path = tmp_path / "model.safetensors"
    save_weights(path, talkative(), ["a", "b", "c"])
    config = small({"MODEL.WEIGHTS": str(path), "MODEL.ROI_HEADS.NUM_CLASSES": 4})
    detector = build_detector(config)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(
        UserError, match="MODEL.WEIGHTS: .*don't fit the model: 4 other shapes.*cls_score.weight 4x32 for 5x32"
    ):
        load_weights(detector, config)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_other_classes_are_refused(small, tmp_path, talkative):
    path = tmp_path / "model.safetensors"
    save_weights(path, talkative(), ["a", "b", "c"])
    config = small({"MODEL.WEIGHTS": str(path)})
    with pytest.raises(UserError, match="trained on the classes a, b, c, these data have c, b, a"):
        load_weights(build_detector(config), config, ["c", "b", "a"])


@pytest.mark.parametrize("name", ["nothing.safetensors", "nothing.pth"])
def test_no_such_file(small, tmp_path, name):
    config = small({"MODEL.WEIGHTS": str(tmp_path / name)})
    with pytest.raises(UserError, match="no such weights file"):
        load_weights(build_detector(config), config)


def test_a_pickle_is_not_opened(small, tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"model": {}}))
    config = small({"MODEL.WEIGHTS": str(tmp_path / "R-50.pkl")})
    with pytest.raises(UserError, match=r"R-50.pkl: .*pickle.*--trust-pickle"):
        load_weights(build_detector(config), config)


def test_no_weights_are_random(small):
    assert load_weights(build_detector(small()), small()) == "random"


def test_a_damaged_file(small, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not weights at all")
    for read in (
        saved_classes,
        lambda path: load_weights(build_detector(small()), small({"MODEL.WEIGHTS": str(path)})),
    ):
        with pytest.raises(UserError, match="model.safetensors: damaged, or not a safetensors file"):
            read(path)
