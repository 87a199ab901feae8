"""Losses that see all levels at once, or the objects' boxes, against loops written from their formulas."""

import cmath
import math

import numpy as np
import pytest
import torch

from nst_det.losses import LayerPair, ModelOutputs, build_transfer, fgd_loss, get_term, hcl_loss
from nst_det.losses.fgd import box_masks
from nst_det.losses.ops import compute_now

RNG = np.random.default_rng(5)
BOXES = [
    # in shares of the image: two that overlap, one of a point, one beyond the border
    torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.4, 0.4, 0.5, 0.6], [0.9, 0.9, 0.9, 0.9], [0.8, -0.1, 1.2, 0.1]]),
    torch.zeros(0, 4),
]


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def numbers(value):
    return value.detach().numpy()


def convolution(image, weight, bias=None):
    """One image (C, H, W), zeros around it; odd square kernels."""
    reach, (_, height, width) = weight.shape[2] // 2, image.shape
    out = np.zeros((len(weight), height, width), dtype=complex)
    for o, y, x in np.ndindex(out.shape):
        total = 0 if bias is None else bias[o]
        for c, j, i in np.ndindex(weight.shape[1:]):
            row, column = y + j - reach, x + i - reach
            if 0 <= row < height and 0 <= column < width:
                total += weight[o, c, j, i] * image[c, row, column]
        out[o, y, x] = total
    return out


def normalized(images, layer):
    """Batch normalization in training."""
    out = np.zeros_like(images)
    for c in range(images.shape[1]):
        values = images[:, c].ravel()
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        scale = numbers(layer.weight)[c] / cmath.sqrt(variance + layer.eps)
        out[:, c] = (images[:, c] - mean) * scale + numbers(layer.bias)[c]
    return out


def averages(image, side):
    """Adaptive average pooling of (H, W), by its definition."""
    height, width = image.shape
    out = np.zeros((side, side), dtype=complex)
    for y, x in np.ndindex(out.shape):
        rows = range(y * height // side, -(-(y + 1) * height // side))
        columns = range(x * width // side, -(-(x + 1) * width // side))
        out[y, x] = sum(image[j, i] for j in rows for i in columns) / (len(rows) * len(columns))
    return out


def context_loss(student, teacher):
    """The hierarchical loss of two sets of maps (B, C, H, W)."""
    squares = [(a - b) ** 2 for a, b in zip(student.ravel(), teacher.ravel())]
    total, weight, weights = sum(squares) / len(squares), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            weight /= 2
            weights += weight
            squares = []
            for mine, theirs in zip(student, teacher):
                for one, other in zip(mine, theirs):
                    squares += ((averages(one, side) - averages(other, side)) ** 2).ravel().tolist()
            total += weight * sum(squares) / len(squares)
    return total / weights


@pytest.mark.parametrize("size", [(5, 6), (3, 3), (1, 1)])
def test_the_hierarchical_loss(size, check_formula):
    student, teacher = RNG.standard_normal((2, 1, *size)), RNG.standard_normal((2, 1, *size))
    check_formula(lambda x: context_loss(x, teacher), lambda x: hcl_loss(x, tensor(teacher)), student)


def test_reviewkd(check_formula):
    """Two levels, of other widths than the teacher's; the larger teacher's map is averaged down."""
    pairs = (LayerPair("res3", "res3", 2, 2), LayerPair("res4", "res4", 3, 1))
    module = get_term("reviewkd").build(pairs, width=2).double().train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.7)
    upper, lower = (2, 2, 3, 4), (2, 3, 2, 2)
    teachers = [RNG.standard_normal((2, 2, 3, 4)), RNG.standard_normal((2, 1, 4, 4))]
    split = math.prod(upper)

    def formula(x):
        maps, below, total = [x[:split].reshape(upper), x[split:].reshape(lower)], None, 0
        for level in (1, 0):
            fusion = module.fusions[level]
            enter, leave = numbers(fusion.enter[0].weight), numbers(fusion.leave[0].weight)
            mixed = normalized(np.stack([convolution(image, enter) for image in maps[level]]), fusion.enter[1])
            if below is not None:
                weight, bias = (numbers(value) for value in fusion.attention[0].parameters())
                for b in range(len(mixed)):
                    height, width = mixed.shape[2:]
                    near = np.zeros_like(mixed[b])
                    for c, j, i in np.ndindex(near.shape):
                        near[c, j, i] = below[b, c, j * below.shape[2] // height, i * below.shape[3] // width]
                    shares = convolution(np.concatenate([mixed[b], near]), weight, bias)
                    shares = [[[1 / (1 + cmath.exp(-v)) for v in row] for row in one] for one in shares]
                    mixed[b] = mixed[b] * np.array(shares[0]) + near * np.array(shares[1])
            below = mixed
            found = normalized(np.stack([convolution(image, leave) for image in mixed]), fusion.leave[1])
            wanted = teachers[level]
            if level == 1:
                wanted = np.stack([np.stack([averages(one, 2) for one in image]) for image in wanted])
            total += context_loss(found, wanted)
        return total

    def loss(x):
        maps = [x[:split].reshape(upper), x[split:].reshape(lower)]
        return sum(module(maps, [tensor(t) for t in teachers], [compute_now] * 2))

    check_formula(formula, loss, RNG.standard_normal(split + math.prod(lower)))


def test_a_term_over_all_levels_has_one_network_and_a_value_each():
    channels = {"res3": 4, "res4": 6}
    term = build_transfer(
        "reviewkd", levels=["res3", "res4"], student_channels=channels, teacher_channels={"res3": 5, "res4": 7}
    )
    student = ModelOutputs(maps={"res3": torch.randn(2, 4, 8, 8), "res4": torch.randn(2, 6, 4, 4)})
    teacher = ModelOutputs(maps={"res3": torch.randn(2, 5, 8, 8), "res4": torch.randn(2, 7, 4, 4)})
    values = term(student, teacher)
    assert list(term.parts["reviewkd"]) == ["res3", "res4"]
    torch.testing.assert_close(sum(term.parts["reviewkd"].values()), values["reviewkd"].detach())
    modules = {id(term.module("reviewkd", pair)) for pair in term.pairs["reviewkd"]}
    assert len(modules) == 1
    # min(512, the student's widest level)
    assert [fusion.enter[0].weight.shape[:2] for fusion in next(iter(term.terms["reviewkd"].values())).fusions] == [
        (6, 4),
        (6, 6),
    ]
    values["reviewkd"].backward()
    assert all(parameter.grad is not None for parameter in term.parameters())
    turned = build_transfer("reviewkd", levels=["res4", "res3"], student_channels=channels, teacher_channels=channels)
    with pytest.raises(ValueError, match="reviewkd: .*largest"):
        turned(student, student)


def masks(boxes, height, width):
    """What a position counts, by going through all positions of each box."""
    objects = np.zeros((height, width))
    for left, top, right, bottom in boxes.double().tolist():
        columns = range(math.floor(left * width), math.ceil(right * width) + 1)
        rows = range(math.floor(top * height), math.ceil(bottom * height) + 1)
        for y in rows:
            for x in columns:
                if 0 <= y < height and 0 <= x < width:
                    objects[y, x] = max(objects[y, x], 1 / (len(rows) * len(columns)))
    background = (objects == 0).astype(float)
    return objects, background / max(background.sum(), 1)


def test_what_a_position_counts():
    boxes, sizes = [*BOXES, torch.tensor([[0.0, 0.0, 1.0, 1.0]])], [(4, 6), (1, 1), (7, 3)]
    for size, found in zip(sizes, box_masks([of_image.double() for of_image in boxes], sizes)):
        for index, of_image in enumerate(boxes):
            for mine, wanted in zip(found, masks(of_image, *size)):
                np.testing.assert_allclose(mine[index].numpy(), wanted, rtol=1e-12)
        assert float(found[1][2].sum()) == 0
    assert not any(float(objects.sum()) for objects, _ in box_masks([torch.zeros(0, 4)] * 2, sizes))


@pytest.mark.parametrize(("channels", "options"), [((2, 3), {}), ((3, 3), {"temperature": 0.8, "relation": 0.0})])
def test_fgd(channels, options, check_formula):
    # factors of one size, so that each part can be wrong
    options = {"objects": 0.5, "background": 2.0, "focus": 0.3, "relation": 0.7} | options
    module = get_term("fgd").build([LayerPair("p3", "p3", *channels)], **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.2, 0.7)
    level, temperature = module.levels[0], options.get("temperature", 0.5)
    height, width = 3, 2
    teacher = RNG.standard_normal((2, channels[1], height, width))
    boxes = [of_image.double() for of_image in BOXES]

    def size(value):
        # |v| as a holomorphic function of v
        return value if value.real >= 0 else -value

    def attention(image):
        count, (_, rows, columns) = len(image), image.shape
        places = [(y, x) for y in range(rows) for x in range(columns)]
        spatial = {p: cmath.exp(sum(size(c[p]) for c in image) / count / temperature) for p in places}
        channel = [cmath.exp(sum(size(c[p]) for p in places) / len(places) / temperature) for c in image]
        return (
            {p: len(places) * value / sum(spatial.values()) for p, value in spatial.items()},
            [count * value / sum(channel) for value in channel],
        )

    def related(image, context):
        where, shift = (numbers(value) for value in context.where.parameters())
        first, bias, scale, offset, last, end = (numbers(value) for value in context.change.parameters())
        logits = convolution(image, where, shift)[0]
        weights = np.array([[cmath.exp(v) for v in row] for row in logits])
        weights = weights / weights.sum()
        pooled = [(channel * weights).sum() for channel in image]
        hidden = [sum(w * v for w, v in zip(row, pooled)) + b for row, b in zip(first, bias)]
        mean = sum(hidden) / len(hidden)
        variance = sum((v - mean) ** 2 for v in hidden) / len(hidden)
        hidden = [(v - mean) / cmath.sqrt(variance + 1e-5) * a + b for v, a, b in zip(hidden, scale, offset)]
        hidden = [v if v.real > 0 else 0 for v in hidden]
        change = [sum(w * v for w, v in zip(row, hidden)) + b for row, b in zip(last, end)]
        return image + np.array(change)[:, None, None]

    def formula(x):
        total = 0
        for image, target, of_image in zip(x, teacher.astype(complex), boxes):
            if channels[0] != channels[1]:
                image = convolution(image, *(numbers(value) for value in level.adapter.parameters()))
            objects, background = masks(of_image, height, width)
            spatial, channel = attention(target)
            for c, y, i in np.ndindex(target.shape):
                share = options["objects"] * objects[y, i] + options["background"] * background[y, i]
                total += share * spatial[y, i] * channel[c] * (image[c, y, i] - target[c, y, i]) ** 2
            mine = attention(image)
            total += options["focus"] * sum(size(mine[0][p] - spatial[p]) for p in spatial)
            total += options["focus"] * sum(size(a - b) for a, b in zip(mine[1], channel))
            if options["relation"]:
                pair = [related(maps, context) for maps, context in zip((image, target), level.contexts)]
                total += options["relation"] * ((pair[0] - pair[1]) ** 2).sum()
        return total / len(x)

    student = RNG.standard_normal((2, channels[0], height, width))
    check_formula(formula, lambda x: module([x], [tensor(teacher)], [compute_now], boxes)[0], student)


def test_fgd_of_equal_maps_without_objects_is_zero_and_finite_where_all_is_dead():
    maps = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert float(fgd_loss(maps, maps, [torch.zeros(0, 4)] * 2)) == 0
    module = get_term("fgd").build([LayerPair("p3", "p3", 3, 3)])
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    (value,) = module([dead], [torch.randn(2, 3, 8, 8)], [compute_now], BOXES)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(dead.grad).all()


def test_boxes_that_are_not_there_are_missed_in_one_line():
    term = build_transfer("fgd", levels=["p3"], student_channels={"p3": 3}, teacher_channels={"p3": 3})
    maps = {"p3": torch.randn(2, 3, 4, 4)}
    with pytest.raises(ValueError, match="no boxes"):
        term(ModelOutputs(maps=maps), ModelOutputs(maps=maps))
    given = ModelOutputs(maps=maps, boxes=BOXES)
    assert float(term(given, ModelOutputs(maps={"p3": torch.randn(2, 3, 4, 4)}))["fgd"].detach()) > 0
    assert [len(of_image) for of_image in given.images(torch.tensor([1, 0])).boxes] == [0, 4]
    assert [len(of_image) for of_image in given.images(slice(0, 1)).boxes] == [4]
