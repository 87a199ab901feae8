"""Which anchors and proposals are trained on, and their losses, against plain loops over images."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from nst_det.detection.torchvision import sampling
from nst_det.detection.torchvision.batch import NO_OBJECT, Truth, read_truth
from nst_det.detection.torchvision.sampling import IGNORED, KEYS, match, random_keys, sample

OBJECTS = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
# IoU with the first: 1, 0.5, 0.2, 0; with the second: 0, 0, 0, 0.35
CANDIDATES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 5, 10], [0, 0, 2, 10], [20, 0, 23.5, 10]])


def truth_of(*images):
    """The truth of images, each a list of boxes with labels, with seeds 0, 1, ..."""
    items = [
        {"image": torch.zeros(3, 96, 96), "boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels, "seed": seed}
        for seed, (boxes, labels) in enumerate((boxes, torch.tensor(labels)) for boxes, labels in images)
    ]
    return read_truth(items, torch.device("cpu"))[1]


def test_objects_are_padded_and_keep_all_their_digits(batch):
    limits, truth = read_truth([{**item, "seed": 2**62 + 7} for item in batch], torch.device("cpu"))
    assert limits.tolist() == [[96, 70, 96, 70], [81, 96, 81, 96], [64, 64, 64, 64]]
    assert truth.real.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    for item, boxes, labels, real in zip(batch, truth.boxes, truth.labels, truth.real):
        assert torch.equal(boxes[real], item["boxes"])
        assert torch.equal(labels[real], item["labels"])
        assert (labels[~real] == NO_OBJECT).all()
    rows = [
        tuple(read_truth([{**batch[0], "seed": seed}], torch.device("cpu"))[1].seeds[0])
        for seed in range(2**62, 2**62 + 3)
    ]
    assert len(set(itertools.chain.from_iterable(map(int, row) for row in rows))) == 12, "all seeds differ"
    assert torch.equal(truth.seeds[0], truth.seeds[1])


def test_match():
    objects, real = OBJECTS[None], torch.tensor([[True, True]])

    def matched(*how):
        index, label = match(objects, real, CANDIDATES, *how)
        return index[0].tolist(), label[0].tolist()

    assert matched([0.3, 0.7], (0, IGNORED, 1)) == ([0, 0, 0, 1], [1, -1, 0, -1])
    # every object keeps its best candidate
    assert matched([0.3, 0.7], (0, IGNORED, 1), True)[1] == [1, -1, 0, 1]
    # a bound belongs to the label above it
    assert matched([0.5], (0, 1))[1] == [1, 1, 0, 0]
    none = match(torch.zeros(1, 1, 4), torch.tensor([[False]]), CANDIDATES, [0.3, 0.7], (0, IGNORED, 1), True)
    assert none[1].tolist() == [[0, 0, 0, 0]]


def match_by_image(objects, boxes, low_quality):
    """The best object and the label of each box of one image, threshold by threshold."""
    if not len(objects):
        return [0] * len(boxes), [0] * len(boxes)
    overlap = box_iou(objects, boxes)
    best, index = overlap.max(dim=0)
    label = [1 if value >= 0.7 else IGNORED if value >= 0.3 else 0 for value in best.tolist()]
    for row in overlap if low_quality else ():
        for place in torch.nonzero(row == row.max()).flatten().tolist():
            label[place] = 1
    return index.tolist(), label


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("pairs", [2**26, 100])
def test_matching_a_batch_is_matching_each_image(monkeypatch, low_quality, pairs):
    # also where memory allows one image at a time
    monkeypatch.setattr(sampling, "MOST_PAIRS", pairs)
    torch.manual_seed(1)
    # whole pixels: many boxes have the same IoU
    boxes = torch.cat((corners := torch.randint(0, 20, (60, 2)).float(), corners + torch.randint(4, 12, (60, 2))), 1)
    boxes[7] = boxes[3]
    objects = [boxes[[3, 9, 20]], boxes[:0], boxes[[30]] + 1, torch.tensor([[300.0, 300, 310, 310]])]
    truth = truth_of(*((rows.tolist(), [0] * len(rows)) for rows in objects))
    together = match(truth.boxes, truth.real, boxes, [0.3, 0.7], (0, IGNORED, 1), low_quality)
    for of_image, index, label in zip(objects, *together):
        expected_index, expected = match_by_image(of_image, boxes, low_quality)
        assert label.tolist() == expected
        found = torch.tensor(expected) == 1
        if low_quality and len(of_image) == 1 and not box_iou(of_image, boxes).any():
            assert found.all(), "an object that no box touches: all are its best, as in Detectron2"
        assert index[found].tolist() == torch.tensor(expected_index)[found].tolist()


def keys_of(images, count):
    return random_keys(torch.stack((torch.arange(images), torch.arange(images) * 7919), 1).int(), count)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([IGNORED, 0, 1]), min_size=1, max_size=40),
    st.integers(1, 50),
    st.floats(0, 1),
)
def test_sample_takes_what_it_may(labels, count, fraction):
    label = torch.tensor([labels, [0] * len(labels)])
    places, drawn = sample(label == 1, label == 0, count, fraction, keys_of(2, len(labels)))
    assert places.shape == drawn.shape == (2, min(count, len(labels)))
    taken = label.gather(1, places)
    for row, chosen, kinds, of_image in zip(places, drawn, taken, label):
        positive = min(int((of_image == 1).sum()), int(count * fraction))
        negative = min(int((of_image == 0).sum()), count - positive)
        # objects first, then background, then what fills up
        assert chosen.tolist() == [True] * (positive + negative) + [False] * (len(row) - positive - negative)
        assert kinds[chosen].tolist() == [1] * positive + [0] * negative
        assert len(set(row[chosen].tolist())) == positive + negative


def test_each_choice_is_as_likely_as_any_other():
    images, label = 20000, torch.tensor([1, 1, 0, 1, -1, 0, 1, 0])
    labels = label.expand(images, -1)
    places, drawn = sample(labels == 1, labels == 0, 4, 0.5, keys_of(images, 8))
    assert drawn.all()
    counts = Counter(frozenset(row) for row in places.tolist())
    # two of four objects and two of three of the background, independent of each other
    pairs = [itertools.combinations(torch.nonzero(label == kind).flatten().tolist(), 2) for kind in (1, 0)]
    choices = [frozenset(one + other) for one, other in itertools.product(*pairs)]
    expected = images / len(choices)
    assert set(counts) == set(choices)
    # 17 degrees of freedom: above 40.8 in one of a thousand cases
    assert sum((counts[choice] - expected) ** 2 / expected for choice in choices) < 40.8


def test_keys_are_of_seed_and_place_alone():
    seeds = torch.tensor([[5, 0], [6, 0], [5, 1], [-5, 2**31 - 1]], dtype=torch.int32)
    keys = random_keys(seeds, 1000)
    assert torch.equal(random_keys(seeds[1:2], 300), keys[1:2, :300])
    for one, other in itertools.combinations(keys, 2):
        # two independent rows of as many numbers below KEYS
        assert len({*one.tolist()} & {*other.tolist()}) < 5
        correlation = torch.corrcoef(torch.stack((one, other)).double())[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(1000)
    spread = torch.histc(keys_of(100, 1000).double() / KEYS, 20, 0, 1)
    # 19 degrees of freedom
    assert float(((spread - 5000) ** 2 / 5000).sum()) < 43.8


def test_rois_are_sampled_with_their_objects(roi_heads):
    heads = roi_heads()
    truth = truth_of(([[0.0, 0, 10, 10], [20, 20, 40, 40]], [1, 0]), ([], []))
    proposals = torch.tensor([[0.0, 0, 10, 9], [20, 20, 30, 30], [21, 20, 40, 40]]).expand(2, -1, -1)
    valid = torch.tensor([[True, True, True], [True, False, True]])
    rois, targets, labels, drawn = heads.sample_proposals(proposals, valid, truth)
    by_roi = {
        tuple(roi): (tuple(target), label)
        for roi, target, label in zip(*(values[0][drawn[0]].tolist() for values in (rois, targets, labels)))
    }
    assert len(by_roi) == 5
    assert by_roi[0, 0, 10, 9] == ((0, 0, 10, 10), 1)
    assert by_roi[21, 20, 40, 40] == ((20, 20, 40, 40), 0)
    # IoU 0.25: background, which is the last class
    assert by_roi[20, 20, 30, 30][1] == 2
    # the objects themselves are proposals too
    assert by_roi[20, 20, 40, 40] == ((20, 20, 40, 40), 0)
    # an image without objects has background alone, of the proposals that there are
    assert sorted(rois[1][drawn[1]].tolist()) == [[0, 0, 10, 9], [21, 20, 40, 40]]
    assert labels[1][drawn[1]].tolist() == [2, 2]
    alone = roi_heads(PROPOSAL_APPEND_GT=False).sample_proposals(proposals, valid, truth)
    assert alone[3].sum(dim=1).tolist() == [3, 2]


def smooth_l1_loop(deltas, target, beta):
    gaps = (deltas - target).abs()
    if not beta:
        return gaps.sum()
    return torch.where(gaps < beta, 0.5 * gaps**2 / beta, gaps - 0.5 * beta).sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MODEL.RPN.CONV_DIMS": [-1, 8], "MODEL.RPN.BOUNDARY_THRESH": 0, "MODEL.RPN.LOSS_WEIGHT": 3.0},
        {"MODEL.RPN.SMOOTH_L1_BETA": 0.11, "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 0.5},
    ],
    ids=["plain", "two convolutions", "smooth"],
)
def test_rpn_losses_are_those_of_the_whole_maps_image_by_image(talkative, batch, changes):
    rpn, config = (detector := talkative(changes)).proposal_generator, detector.proposal_generator.settings
    limits, truth = read_truth([{**item, "seed": 3} for item in batch], torch.device("cpu"))
    torch.manual_seed(0)
    maps = {f"p{level}": torch.randn(3, 16, 96 // 2**level, 96 // 2**level) for level in range(2, 6)}
    maps["p6"] = torch.randn(3, 16, 2, 2)
    leaves = [map_.requires_grad_() for map_ in maps.values()]
    losses = rpn.train()(maps, limits, truth)[2]
    grid = rpn.grid(list(maps.values()))
    places, positive, drawn, _ = rpn.choose(grid, limits, truth)
    logits, deltas = (torch.cat(parts, dim=1) for parts in rpn.rpn_head(list(maps.values())))
    coder, classification, distance = BoxCoder(tuple(config.BBOX_REG_WEIGHTS)), 0.0, 0.0
    for image, item in enumerate(batch):
        index, _ = match_by_image(item["boxes"], grid.anchors, low_quality=True)
        for place, is_object in zip(places[image][drawn[image]].tolist(), positive[image].tolist()):
            classification = classification + F.softplus(-logits[image, place] if is_object else logits[image, place])
            if is_object:
                target = coder.encode_single(item["boxes"][index[place]][None], grid.anchors[place][None])[0]
                distance = distance + smooth_l1_loop(deltas[image, place], target, config.SMOOTH_L1_BETA)
    normalizer = config.BATCH_SIZE_PER_IMAGE * len(batch)
    expected = {
        "loss_rpn_cls": classification / normalizer * config.LOSS_WEIGHT,
        "loss_rpn_loc": distance / normalizer * config.LOSS_WEIGHT * config.BBOX_REG_LOSS_WEIGHT,
    }
    assert drawn.sum() > 90
    assert 0 < positive.sum() < 40
    parameters = [*rpn.parameters(), *leaves]
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-6)
        mine, theirs = (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for loss in (losses[name], value)
        )
        for parameter, *both in zip(parameters, mine, theirs):
            one, other = (torch.zeros_like(parameter) if value is None else value for value in both)
            assert float((one - other).norm()) <= 1e-5 * float(other.norm()) + 1e-9


def test_rpn_draws_by_detectron2s_rules(talkative, batch):
    rpn = talkative({"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16, "MODEL.RPN.BOUNDARY_THRESH": 0}).proposal_generator
    limits, truth = read_truth([{**item, "seed": 3} for item in batch], torch.device("cpu"))
    grid = rpn.grid([torch.zeros(3, 16, 24 // 2**level, 24 // 2**level) for level in range(5)])
    places, positive, drawn, targets = rpn.choose(grid, limits, truth)
    for image, (item, (width, height)) in enumerate(zip(batch, limits[:, :2].tolist())):
        index, label = match_by_image(item["boxes"], grid.anchors, low_quality=True)
        for place, is_object, target in zip(places[image].tolist(), positive[image].tolist(), targets[image]):
            x0, y0, x1, y1 = grid.anchors[place].tolist()
            assert min(x0, y0) >= 0
            assert x1 < width
            assert y1 < height
            assert label[place] == int(is_object)
            assert torch.equal(target, item["boxes"][index[place]] if is_object else grid.anchors[place])
    assert drawn.all()


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_losses_are_those_of_each_roi(roi_heads, agnostic):
    heads = roi_heads(**{"ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5, "ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": agnostic})
    torch.manual_seed(0)
    logits, deltas = torch.randn(30, 3), torch.randn(30, 4 if agnostic else 8, requires_grad=True)
    boxes, targets = (torch.cat((x := torch.rand(30, 2) * 50, x + 1 + torch.rand(30, 2) * 50), 1) for _ in range(2))
    labels = torch.arange(30) % 3
    losses = heads.losses(logits, deltas, boxes, targets, labels)
    coder, distance = BoxCoder((10.0, 10.0, 5.0, 5.0)), 0.0
    for row, label in enumerate(labels.tolist()):
        if label < 2:
            start = 0 if agnostic else 4 * label
            target = coder.encode_single(targets[row][None], boxes[row][None])[0]
            distance = distance + smooth_l1_loop(deltas[row, start : start + 4], target, 0.5)
    expected = 2.0 * distance / 30
    assert float(losses["loss_box_reg"].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    mine, theirs = (torch.autograd.grad(loss, deltas)[0] for loss in (losses["loss_box_reg"], expected))
    assert torch.allclose(mine, theirs, atol=1e-7)
    assert float(losses["loss_cls"]) == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-6)


def test_what_is_drawn_is_a_function_of_the_images_seed(talkative, batch):
    detector, seen = talkative().train(), []
    detector.roi_heads.box_pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    other = {**batch[1], "image": batch[0]["image"], "seed": 8}
    for items in ([{**batch[0], "seed": 5}, other], [other, {**batch[0], "seed": 5}], [{**batch[0], "seed": 6}, other]):
        # the same weights, and statistics of the same images
        detector.load_state_dict(talkative().state_dict())
        detector(items)
    first, turned, another = seen
    assert torch.equal(first[0], turned[1])
    assert torch.equal(first[1], turned[0])
    assert torch.equal(first[1], another[1])
    assert not torch.equal(first[0], another[0])


@pytest.mark.detectron2
def test_as_many_as_detectron2_draws_as_likely():
    sampling2 = pytest.importorskip("detectron2.modeling.sampling", reason="Detectron2 is not installed")
    label, images = torch.tensor([1] * 5 + [0] * 9 + [-1] * 4), 2000
    labels = label.expand(images, -1)
    torch.manual_seed(0)
    for count, fraction in ((6, 0.5), (12, 0.9), (40, 0.5)):
        places, drawn = sample(labels == 1, labels == 0, count, fraction, keys_of(images, len(label)))
        ours = Counter(places[drawn].tolist())
        theirs: Counter[int] = Counter()
        for _ in range(images):
            positive, negative = sampling2.subsample_labels(label, count, fraction, 0)
            theirs.update([*positive.tolist(), *negative.tolist()])
        assert ours.total() == theirs.total()
        for place in range(len(label)):
            assert abs(ours[place] - theirs[place]) <= 5 * math.sqrt(images / 2)


def test_truth_has_no_object_in_padded_rows():
    truth = truth_of(([], []), ([[1.0, 2, 3, 4]], [2]))
    assert isinstance(truth, Truth)
    assert truth.real.tolist() == [[False], [True]]
    assert truth.labels.tolist() == [[NO_OBJECT], [2]]
