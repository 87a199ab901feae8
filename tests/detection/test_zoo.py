"""Detectors of torchvision's zoo as the start of another one; Detectron2's are in tests/detectron2."""

import hashlib

import pytest
import torch
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from nst_det.detection import pipeline
from nst_det.detection.box_head import box_outputs
from nst_det.detection.checkpoint import load_weights, save_weights
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.batch import limits_of
from nst_det.detection.zoo import UNUSED, ClassNames, coco_classes, zoo_keys
from nst_det.errors import UserError
from nst_det.models.convert import convert
from tests.helpers.detection import randomize

CLASSES = ["car", "forklift", "person"]
PREDICTOR = "roi_heads.box_predictor."


def torchvisions(arch="resnet18", classes=91):
    """torchvision's own Faster R-CNN with random weights that say something else for each box."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name=arch, weights=None, trainable_layers=5)
    detector = FasterRCNN(
        backbone,
        num_classes=None,
        box_head=TwoMLPHead(256 * 49, 16),
        box_predictor=FastRCNNPredictor(16, classes),
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
    )
    randomize(detector, (detector.rpn.head.cls_logits, detector.rpn.head.bbox_pred))
    return detector.eval()


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A detector of 91 classes of torchvision's own code, and its file."""
    detector, path = torchvisions(), tmp_path_factory.mktemp("zoo") / "coco.pth"
    torch.save(detector.state_dict(), path)
    return detector, path


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_what_torchvisions_computes_from_pixels_to_box_features(small, tmp_path, arch, caplog):
    caplog.set_level("INFO")
    theirs, path = torchvisions(arch), tmp_path / "theirs.pth"
    # as torchvision's training scripts write it
    torch.save({"model": theirs.state_dict(), "epoch": 25}, path)
    keys = zoo_keys(path)
    assert keys["MODEL.TIMM.ARCH"] == arch
    config = small({**keys, "MODEL.WEIGHTS": str(path)})
    ours = build_detector(config).eval()
    assert load_weights(ours, config, CLASSES, starts=True) == "detector"
    assert "its own detector has" not in caplog.text
    other = small({**keys, "MODEL.WEIGHTS": str(path), "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2"})
    load_weights(build_detector(other), other, CLASSES, starts=True)
    assert caplog.text.rstrip().endswith("its own detector has MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign")
    images, sizes = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)), [(96, 128), (90, 101)]
    with torch.no_grad():
        maps, wanted = ours.backbone(images), theirs.backbone(images)
        for own, other in zip(maps.values(), wanted.values(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
        boxes, _ = theirs.rpn(ImageList(images, sizes), wanted)
        found, valid, _ = ours.proposal_generator(maps, limits_of(sizes).float())
        for own, kept, other in zip(found, valid, boxes, strict=True):
            torch.testing.assert_close(own[kept], other, rtol=1e-5, atol=1e-4)
        pooled = theirs.roi_heads.box_head(theirs.roi_heads.box_roi_pool(wanted, boxes, sizes))
        torch.testing.assert_close(box_outputs(ours.roi_heads, maps, boxes)[0], pooled, rtol=1e-5, atol=1e-5)


def test_a_training_begins_with_all_of_it_but_the_predictor(on_shapes, coco, monkeypatch):
    detector, path = coco
    seen = []

    def before_the_first_step(trainer, *_):
        seen.append({name: value.clone() for name, value in trainer.model.state_dict().items()})

    monkeypatch.setattr(pipeline, "train", before_the_first_step)
    monkeypatch.setattr(pipeline, "_evaluate", lambda *_, **__: {})
    config = on_shapes("run", {**zoo_keys(path), "MODEL.WEIGHTS": str(path)})
    pipeline.train_detector(config)
    fresh = build_detector(config, config.SEED).state_dict()
    wanted = convert(detector.state_dict(), "timm")
    assert seen[0].keys() == fresh.keys()
    # but for the counters of batches, which frozen normalization has none of
    assert {name for name in fresh if not name.endswith("num_batches_tracked")} == wanted.keys()
    for name in wanted:
        assert torch.equal(seen[0][name], (fresh if name.startswith(PREDICTOR) else wanted)[name]), name
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS: .*coco\.pth"):
        load_weights(build_detector(config), config, CLASSES)


@pytest.mark.parametrize(
    ("classes", "changes", "kept"),
    [
        (CLASSES, {}, {"car": "car", "person": "person"}),
        # VOC's names, and how others write COCO's
        (["aeroplane", "pottedplant", "sofa"], {}, ["airplane", "potted plant", "couch"]),
        (["Traffic_Light", "tvmonitor", "x"], {}, {"Traffic_Light": "traffic light", "tvmonitor": "tv"}),
        (["bike", "diningtable", "motorbike"], {"MODEL.CLASS_ALIASES": {"bike": "bicycle"}},
         ["bicycle", "dining table", "motorcycle"]),
        # names of one's own in place of COCO's
        (["x", "N/A", "one"], {"MODEL.WEIGHTS_CLASSES": ["zero", "one", "N/A", *range(87)]}, {"one": "bicycle"}),
    ],
)  # fmt: skip
def test_kept_classes_have_their_rows(small, coco, caplog, classes, changes, kept):
    caplog.set_level("INFO")
    detector, path = coco
    config = small({**zoo_keys(path), "MODEL.WEIGHTS": str(path), "MODEL.KEEP_CLASSES": True, **changes})
    ours, fresh = build_detector(config), build_detector(config).state_dict()
    assert load_weights(ours, config, classes, starts=True) == "detector"
    kept = kept if isinstance(kept, dict) else dict(zip(classes, kept))
    # of torchvision's rows the first is the background
    numbered = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    theirs, own = detector.state_dict(), ours.state_dict()
    for entry in (f"{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")):
        width, shape = (1 if "cls" in entry else 4), own[f"{PREDICTOR}{entry}"].shape[1:]
        own_rows, new, old = (state[f"{PREDICTOR}{entry}"].reshape(-1, width, *shape) for state in (own, fresh, theirs))
        if width == 1:
            assert torch.equal(own_rows[-1], old[0])
        for label, name in enumerate(classes):
            assert torch.equal(own_rows[label], old[numbered.index(kept[name])] if name in kept else new[label])
    assert all(name in caplog.text for name in kept)


def test_a_detector_of_ones_own_names_its_classes(small, tmp_path):
    agnostic = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    first, path = build_detector(small({**agnostic, "MODEL.ROI_HEADS.NUM_CLASSES": 2})), tmp_path / "model.safetensors"
    save_weights(path, first, ["cat", "dog"])
    assert zoo_keys(path) == {}
    keys = {**agnostic, "MODEL.KEEP_CLASSES": True, "MODEL.WEIGHTS": str(path)}
    for classes, order in ((["dog", "cat"], [1, 0, 2]), (["x", "dog", "y"], [None, 1, None, 2])):
        config = small({**keys, "MODEL.ROI_HEADS.NUM_CLASSES": len(classes)})
        other, fresh = build_detector(config, 5), build_detector(config, 5)
        load_weights(other, config, classes, starts=True)
        for layer, rows in (("cls_score", order), ("bbox_pred", range(4))):
            own, new, old = (model.state_dict()[f"{PREDICTOR}{layer}.weight"] for model in (other, fresh, first))
            assert torch.equal(own, torch.stack([new[at] if row is None else old[row] for at, row in enumerate(rows)]))


@pytest.mark.parametrize(
    ("changes", "classes", "named"),
    [
        ({}, ["nothing", "known", "here"], r"KEEP_CLASSES: .*coco\.pth.*nothing"),
        ({"MODEL.CLASS_ALIASES": {"bike": "bicycle"}}, CLASSES, "CLASS_ALIASES: .*'bike'.*data"),
        ({"MODEL.CLASS_ALIASES": {"car": "persn"}}, CLASSES, "CLASS_ALIASES: .*'persn'.*weights.*person"),
        ({"MODEL.WEIGHTS_CLASSES": ["a", "b"]}, CLASSES, "90 classes.* 2 names.*WEIGHTS_CLASSES"),
        ({"MODEL.WEIGHTS": ""}, CLASSES, "KEEP_CLASSES: MODEL.WEIGHTS"),
        ({"INPUT.FORMAT": "BGR"}, CLASSES, r"coco\.pth.*INPUT.FORMAT RGB"),
        ({"MODEL.TIMM.ARCH": "nst_resnet50_caffe"}, CLASSES, r"coco\.pth.*stride"),
        ({"MODEL.TIMM.ARCH": "resnet34"}, CLASSES, r"MODEL.WEIGHTS: .*coco\.pth.*missing.*MODEL.TIMM.ARCH resnet18$"),
    ],
)
def test_what_cant_be_kept_is_one_line(small, coco, changes, classes, named):
    config = small({**zoo_keys(coco[1]), "MODEL.WEIGHTS": str(coco[1]), "MODEL.KEEP_CLASSES": True, **changes})
    with pytest.raises(UserError, match=named) as caught:
        load_weights(build_detector(config), config, classes, starts=True)
    assert "\n" not in str(caught.value)


def test_aliases_without_kept_classes_are_refused(small):
    with pytest.raises(UserError, match="CLASS_ALIASES.*KEEP_CLASSES"):
        small({"MODEL.CLASS_ALIASES": {"bike": "bicycle"}})


def test_cocos_classes():
    assert (len(coco_classes(90)), len(coco_classes(80)), coco_classes(20)) == (90, 80, [])
    # as in COCO's own annotations: number 1 is person, 13 stop sign, 90 toothbrush; 12 is unused
    assert [coco_classes(90)[number - 1] for number in (1, 12, 13, 90)] == ["person", UNUSED, "stop sign", "toothbrush"]
    assert UNUSED not in coco_classes(80)
    assert ClassNames(keep=True).shared(["tv"], coco_classes(80), "file") == {0: 62}


def test_masks_are_left_out_and_other_detectors_named(coco, tmp_path):
    state_dict = coco[0].state_dict()
    mask = {"roi_heads.mask_head.0.0.weight": torch.zeros(1), "roi_heads.keypoint_predictor.kps.weight": torch.zeros(1)}
    torch.save(state_dict | mask, tmp_path / "mask.pth")
    assert zoo_keys(tmp_path / "mask.pth") == zoo_keys(coco[1])
    of_detectron2 = convert(state_dict, "detectron2")
    others = {
        "from res3": {name: value for name, value in of_detectron2.items() if "fpn_lateral2" not in name},
        "v2": state_dict | {"backbone.fpn.inner_blocks.0.1.running_mean": torch.zeros(1)},
        "mobilenet": {name.replace("body.conv1.", "body.0.0."): value for name, value in state_dict.items()},
        "retinanet": {name: value for name, value in state_dict.items() if not name.startswith("r")},
    }
    for name, weights in others.items():
        torch.save(weights, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=rf"{name}\.pth: ") as caught:
            zoo_keys(tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)


def test_what_early_files_of_detectron2_have_beside_weights_is_left_out():
    weights = {"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}
    constants = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.0")
    found = convert(weights | dict.fromkeys(constants, torch.zeros(1)), "timm")
    assert found == {"backbone.bottom_up.model.conv1.weight": torch.ones(1)}


def test_the_epsilon_of_a_published_file_is_0(small, tmp_path, monkeypatch):
    theirs, path = torchvisions(), tmp_path / "published.pth"
    norms = [layer for layer in theirs.modules() if isinstance(layer, FrozenBatchNorm2d)]
    for layer in norms:
        # as of channels that are nearly dead
        layer.running_var.mul_(1e-4)
        layer.weight.mul_(1e-2)
    torch.save(theirs.state_dict(), path)
    # torchvision knows its files by the beginning of their SHA-256
    begins = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights, "url", f"https://x/y-{begins}.pth", raising=False)
    config = small({**zoo_keys(path), "MODEL.WEIGHTS": str(path)})
    ours = build_detector(config).eval()
    load_weights(ours, config, CLASSES, starts=True)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    near = []
    for eps in (0.0, 1e-5):
        for layer in norms:
            layer.eps = eps
        with torch.no_grad():
            wanted = theirs.backbone(images)["3"]
            near.append(float((ours.backbone(images)["p5"] - wanted).abs().max() / wanted.abs().max()))
    assert near[0] < 1e-4 < 1e-2 < near[1]
