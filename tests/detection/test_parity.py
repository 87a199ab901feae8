"""One detector, two engines: the same config and weights in Detectron2 and here."""

import pytest
import torch

from nst_det.detection.torchvision.batch import read_truth
from nst_det.detection.torchvision.sampling import IGNORED, random_keys, sample
from tests.helpers.detection import with_instances

pytestmark = pytest.mark.detectron2

SETTINGS = {
    "plain": {},
    "another": {
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        "MODEL.FPN.FUSE_TYPE": "avg",
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 6,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 2.0,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (5.0, 5.0, 2.0, 2.0),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.4],
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 0.5,
        "MODEL.RPN.BOUNDARY_THRESH": 0,
        "MODEL.RPN.CONV_DIMS": [-1, 8],
        "MODEL.RPN.LOSS_WEIGHT": 3.0,
        "MODEL.RPN.SMOOTH_L1_BETA": 0.11,
        "TEST.DETECTIONS_PER_IMAGE": 7,
    },
    "one level": {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
    },
}


@pytest.fixture
def pair(talkative, small_words, base_file, batch):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import build_model

    from nst_det.detectron2.config import load_config

    def build(changes):
        ours = talkative(changes)
        theirs = build_model(load_config(base_file, small_words(changes)))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return ours, theirs, with_instances(batch)

    return build


@pytest.mark.parametrize("name", SETTINGS)
def test_maps_and_detections(pair, batch, name):
    ours, theirs, inputs = pair(SETTINGS[name])
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        pixels, sizes = ours.preprocess([item["image"] for item in batch])
        images = theirs.preprocess_image(inputs)
        assert torch.equal(pixels, images.tensor)
        assert sizes == images.image_sizes
        one, other = ours.backbone(pixels), theirs.backbone(images.tensor)
        assert list(one) == list(other)
        assert max(float((one[level] - other[level]).abs().max()) for level in one) <= 1e-4
        for found, expected in zip(ours(batch), theirs(inputs)):
            expected = expected["instances"]
            assert len(found["boxes"]) == len(expected) > 0
            assert torch.allclose(found["boxes"], expected.pred_boxes.tensor, atol=0.05)
            assert torch.allclose(found["scores"], expected.scores, atol=1e-3)
            assert torch.equal(found["labels"], expected.pred_classes)


def our_choice(batch, append_objects, slots):
    """Detectron2's ``subsample_labels``, which takes those that the torchvision engine takes.

    It is called for the anchors of each image, then for its proposals, of which the engine has ``slots``.
    """
    seeds = read_truth(batch, torch.device("cpu"))[1].seeds
    calls = iter([(item, seed) for halves in seeds.split(2, dim=1) for item, seed in zip(batch, halves)])
    anchors = iter([True] * len(batch) + [False] * len(batch))

    def subsample_labels(label, count, fraction, background):
        item, seed = next(calls)
        # proposals first, in the slots that there are for them, then the objects
        objects = 0 if next(anchors) or not append_objects else len(item["boxes"])
        found = len(label) - objects
        places = torch.cat((torch.arange(found), slots[0] + torch.arange(objects)))
        keys = random_keys(seed[None], int(places.max()) + 1)[:, places]
        negative = (label == background)[None]
        positive = (label != IGNORED)[None] & ~negative
        chosen, drawn = (values[0] for values in sample(positive, negative, count, fraction, keys))
        return tuple(chosen[drawn & kind[0, chosen]] for kind in (positive, negative))

    return subsample_labels


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sampling", ["exhaustive", "sampled"])
def test_losses_and_gradients(pair, batch, exhaustive, monkeypatch, name, sampling):
    from detectron2.modeling.proposal_generator import rpn
    from detectron2.modeling.roi_heads import roi_heads
    from detectron2.utils.events import EventStorage

    batch = [{**item, "seed": seed} for seed, item in enumerate(batch)]
    ours, theirs, inputs = pair({**SETTINGS[name], **(exhaustive if sampling == "exhaustive" else {})})
    ours.train()
    theirs.train()
    slots = []
    ours.proposal_generator.register_forward_hook(lambda _, inputs, outputs: slots.append(outputs[0].shape[1]))
    one = ours(batch)
    if sampling == "sampled":
        choose = our_choice(batch, ours.roi_heads.settings.PROPOSAL_APPEND_GT, slots)
        for module in (rpn, roi_heads):
            monkeypatch.setattr(module, "subsample_labels", choose)
    with EventStorage(0):
        other = theirs(inputs)
    assert set(one) == set(other)
    for key in one:
        assert float(one[key].detach()) == pytest.approx(float(other[key].detach()), rel=1e-4, abs=1e-6), key
    sum(one.values()).backward()
    sum(other.values()).backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        gap = (parameter.grad - expected[key].grad).norm()
        assert float(gap) <= 1e-3 * float(expected[key].grad.norm()) + 1e-7, key
