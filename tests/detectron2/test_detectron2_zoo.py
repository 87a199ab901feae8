"""Detectors of Detectron2's own code, as its zoo has them, as the start of another one on both engines."""

import pickle

import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator

from nst_det.detection.checkpoint import load_weights, save_weights
from nst_det.detection.config import load_detect_config
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.batch import limits_of
from nst_det.detection.zoo import ClassNames, coco_classes, zoo_keys
from nst_det.detectron2 import DistillTrainer, add_config
from nst_det.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detectron2.config import load_config
from nst_det.errors import UserError
from nst_det.models import Bottomup
from nst_det.models.bottomup import load_recognized
from nst_det.models.convert import convert
from nst_det.models.io import trusting_pickles
from tests.helpers.detection import randomize

LEVELS = ["res2", "res3", "res4", "res5"]
CLASSES = ["car", "forklift", "person"]
PREDICTOR = "roi_heads.box_predictor."
KINDS = {
    # as its Faster R-CNNs have them: R_50_FPN_3x, and of ResNeXt a smaller one than X_101_32x8d_FPN_3x
    "R-50": {"INPUT.FORMAT": "BGR"},
    "X-50": {
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    },
}


def theirs_cfg(changes, classes=80):
    cfg = get_cfg()
    add_config(cfg)
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": LEVELS,
        "MODEL.FPN.IN_FEATURES": LEVELS,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        **changes,
    }
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    return cfg


def written(model, path):
    """Write a file as those of Detectron2's zoo are."""
    content = {name: value.numpy() for name, value in model.state_dict().items()}
    # the early ones have these too
    content |= {"pixel_mean": model.pixel_mean.numpy(), "pixel_std": model.pixel_std.numpy()}
    content["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4).numpy()
    path.write_bytes(pickle.dumps({"model": content, "__author__": "Detectron2 Model Zoo"}))
    return path


@pytest.fixture(scope="module", params=KINDS)
def zoo(request, tmp_path_factory):
    """A Detectron2's detector of 80 classes with random weights, its file, and what its config has of its own."""
    torch.manual_seed(0)
    model = build_model(theirs_cfg(KINDS[request.param])).eval()
    head = model.proposal_generator.rpn_head
    randomize(model, (head.objectness_logits, head.anchor_deltas))
    path = written(model, tmp_path_factory.mktemp("zoo") / "model_final.pkl")
    return model, path, KINDS[request.param]


def words(path, changes=None):
    """The keys of a file's detector, read off it."""
    with trusting_pickles():
        keys = zoo_keys(path)
    extra = {"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": path, "MODEL.ROI_HEADS.NUM_CLASSES": 3, "TRUST_PICKLE": True}
    topk = {"MODEL.RPN.PRE_NMS_TOPK_TEST": 100, "MODEL.RPN.POST_NMS_TOPK_TEST": 50}
    return [str(word) for pair in (keys | topk | extra | (changes or {})).items() for word in pair]


def same_maps(ours, theirs, images):
    with torch.no_grad():
        maps, wanted = ours(images), theirs(images)
    for level in ("p2", "p3", "p4", "p5", "p6"):
        torch.testing.assert_close(maps[level], wanted[level], rtol=1e-5, atol=1e-5)
    return maps, wanted


def test_the_torchvision_engine_computes_what_detectron2s_does(zoo, tmp_path):
    theirs, path, _ = zoo
    config = load_detect_config(None, words(path, {"MODEL.KEEP_CLASSES": True}))
    ours = build_detector(config).eval()
    fresh = build_detector(config).state_dict()
    assert load_weights(ours, config, CLASSES, starts=True) == "detector"
    generator = torch.Generator().manual_seed(1)
    batch = [{"image": torch.rand(3, *size, generator=generator) * 255} for size in ((96, 128), (90, 101))]
    pixels, sizes = ours.preprocess([item["image"] for item in batch])
    images = theirs.preprocess_image(batch)
    torch.testing.assert_close(pixels, images.tensor)
    maps, wanted = same_maps(ours.backbone, theirs.backbone, pixels)
    with torch.no_grad():
        proposals, _ = theirs.proposal_generator(images, wanted)
        found, valid, _ = ours.proposal_generator(maps, limits_of(sizes).float())
    for own, kept, other in zip(found, valid, proposals, strict=True):
        torch.testing.assert_close(own[kept], other.proposal_boxes.tensor, rtol=1e-5, atol=1e-4)
    # person is the first of COCO's classes, car the third
    for layer, width in (("cls_score", 1), ("bbox_pred", 4)):
        own, new, old = (
            state[f"{PREDICTOR}{layer}.weight"].unflatten(0, (-1, width))
            for state in (ours.state_dict(), fresh, theirs.state_dict())
        )
        assert torch.equal(own[:3], torch.stack([old[2], new[1], old[0]]))


def test_detectron2s_engine_begins_its_own_detector_and_one_on_timm(zoo, caplog):
    theirs, path, changes = zoo
    caplog.set_level("INFO")
    own = build_model(theirs_cfg({**changes, "MODEL.WEIGHTS": str(path)}, classes=3))
    fresh = {name: value.clone() for name, value in own.state_dict().items()}
    timm = build_model(load_config(None, words(path)))
    with pytest.raises(UserError, match=r"model_final\.pkl.*trust-pickle"):
        BackboneCheckpointer(own, classes=CLASSES).load(str(path))
    with trusting_pickles():
        for model in (own, timm):
            BackboneCheckpointer(model, classes=CLASSES).load(str(path))
            assert "another number of classes: all but the box predictor is filled" in caplog.text
            caplog.clear()
    for name, value in own.state_dict().items():
        assert torch.equal(value, (fresh if name.startswith(PREDICTOR) else theirs.state_dict())[name]), name
    same_maps(timm.eval().backbone, theirs.backbone, torch.randn(1, 3, 64, 96) * 50)


@pytest.mark.parametrize("zoo", ["R-50"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"TRUST_PICKLE": False}, "trust-pickle"),
        ({"MODEL.TIMM.ARCH": "resnet50"}, "STRIDE_IN_1X1 True.*nst_resnet50_caffe"),
        ({"INPUT.FORMAT": "RGB"}, "INPUT.FORMAT BGR"),
        ({"MODEL.PIXEL_STD": [58.0, 57.0, 57.0]}, r"MODEL.PIXEL_STD \[1.0, 1.0, 1.0\]"),
    ],
)
def test_what_detectron2s_dont_fit_is_one_line(zoo, changes, named):
    path = zoo[1]
    config = load_detect_config(None, words(path, changes))
    with pytest.raises(UserError, match=rf"model_final\.pkl: .*{named}") as caught:
        load_weights(build_detector(config), config, CLASSES, starts=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zoo", ["R-50"], indirect=True)
def test_detectron2s_r50_of_imagenet_is_a_bottom_up(zoo, tmp_path, caplog):
    theirs, path = zoo[0].backbone.bottom_up, tmp_path / "R-50.pkl"
    state_dict = {name: value.numpy() for name, value in theirs.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": state_dict, "__author__": "MSRA", "matching_heuristics": True}))
    ours = Bottomup("nst_resnet50_caffe", LEVELS).eval()
    with trusting_pickles():
        load_recognized(ours, path, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], "BGR", "MODEL.WEIGHTS")
        # it doesn't say what its images were
        assert "INPUT.FORMAT BGR" in caplog.text
        with pytest.raises(UserError, match="STRIDE_IN_1X1"):
            load_recognized(Bottomup("resnet50", LEVELS), path, [0, 0, 0], [1, 1, 1], "BGR", "MODEL.WEIGHTS")
    images = torch.randn(1, 3, 64, 96) * 50
    with torch.no_grad():
        maps, wanted = ours(images), theirs(images)
    for level in LEVELS:
        torch.testing.assert_close(maps[level], wanted[level], rtol=1e-5, atol=1e-5)


# torchvision has no R-50 with such a stride
@pytest.mark.parametrize("zoo", ["X-50"], indirect=True)
def test_torchvisions_begins_detectron2s_own_resnet(zoo, tmp_path):
    theirs, _, changes = zoo
    path = tmp_path / "torchvisions.pth"
    torch.save(convert(theirs.state_dict(), "torchvision"), path)
    pixels = {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
    cfg = theirs_cfg({**changes, **pixels, "INPUT.FORMAT": "RGB"}, classes=3)
    model = build_model(cfg)
    BackboneCheckpointer(model, classes=CLASSES).load(str(path))
    same_maps(model.eval().backbone, theirs.backbone, torch.randn(1, 3, 64, 96))


def test_both_engines_round_anchors_alike():
    cfg = theirs_cfg({"MODEL.ANCHOR_GENERATOR.NAME": "RoundedAnchorGenerator"})
    theirs = build_anchor_generator(cfg, [type("Shape", (), {"stride": stride}) for stride in (4, 8, 16, 32, 64)])
    keys = {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES": LEVELS}
    keys |= {
        key: cfg.MODEL.ANCHOR_GENERATOR[key.rpartition(".")[2]]
        for key in ("MODEL.ANCHOR_GENERATOR.NAME", "MODEL.ANCHOR_GENERATOR.SIZES")
    }
    keys |= {
        "MODEL.RPN.IN_FEATURES": cfg.MODEL.RPN.IN_FEATURES,
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    }
    keys |= {
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    }
    ours = build_detector(load_detect_config(None, [str(word) for pair in keys.items() for word in pair]))
    cells = list(ours.proposal_generator.anchors.buffers())
    assert len(cells) == 5
    for own, other in zip(cells, theirs.cell_anchors, strict=True):
        assert torch.equal(own, other)
        assert torch.equal(own, own.round())


def test_cocos_classes_are_detectron2s():
    assert coco_classes(80) == [item["name"] for item in COCO_CATEGORIES if item["isthing"]]


def test_a_resumed_training_keeps_what_it_learned(configured, tmp_path):
    """MODEL.KEEP_CLASSES and WEIGHTS_CLASSES are of the weights that a training begins with, not of its checkpoints."""
    start = build_model(configured("DATASETS.CLASSES", "[bar,square]"))
    path = tmp_path / "other.safetensors"
    save_weights(path, start, [])
    cfg = configured(
        *(
            "MODEL.WEIGHTS",
            path,
            "MODEL.KEEP_CLASSES",
            True,
            "MODEL.WEIGHTS_CLASSES",
            "[square,ring]",
            "SOLVER.MAX_ITER",
            1,
        )
    )
    first = DistillTrainer(cfg)
    first.resume_or_load(resume=False)
    rows = first.student.state_dict()[f"{PREDICTOR}cls_score.weight"]
    # bar is new, square was the first
    assert torch.equal(rows[1:], start.state_dict()[f"{PREDICTOR}cls_score.weight"][[0, 2]])
    with torch.no_grad():
        rows.add_(1)
    first.checkpointer.save("model_0000000", iteration=0)
    again = DistillTrainer(cfg)
    again.resume_or_load(resume=True)
    assert torch.equal(again.student.state_dict()[f"{PREDICTOR}cls_score.weight"], rows)
    for named in ("backbone://small", ""):
        with pytest.raises(UserError, match=f"KEEP_CLASSES: .*{named.removeprefix('backbone://')}"):
            BackboneCheckpointer(build_model(cfg), names=ClassNames(keep=True)).load(named)
