"""Terms on logits and embeddings: the teacher's box head on the student's proposals."""

import copy
import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from nst_det.detection.config import detector_transfer_node
from nst_det.detection.distiller import distill
from nst_det.detection.torchvision import build_detector
from nst_det.errors import UserError
from nst_det.losses.ops import compute_now
from tests.helpers.detection import step, with_instances

WIDE = {"MODEL.TIMM.ARCH": "nst_resnet18_w48", "MODEL.FPN.OUT_CHANNELS": 24, "MODEL.ROI_BOX_HEAD.FC_DIM": 40}


def node(method="kd", **values):
    made = detector_transfer_node()
    made.LEVELS = ["p3"]
    made.update(values)
    return method, made


@pytest.fixture
def teacher(talkative):
    # other heads than the student's
    torch.manual_seed(5)
    detector = talkative(WIDE)
    for parameter in detector.roi_heads.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return detector


def by_hand(detector, maps, boxes):
    """Logits (R, K + 1) in float64: RoIAlign of each box on the level of its size, then the two layers."""
    heads, rows = detector.roi_heads, []
    weights = {name: value.detach().double().numpy() for name, value in heads.state_dict().items()}
    for image, of_image in enumerate(boxes):
        for box in of_image.double():
            side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            level = min(max(math.floor(3 + math.log2(side / 56 + 1e-8)), 2), 5)
            of_level = maps[f"p{level}"][image : image + 1]
            x = roi_align(of_level, [box[None]], 5, 0.5**level, 1, True).flatten().numpy()
            for layer in ("fc1", "fc2"):
                x = np.maximum(weights[f"box_head.{layer}.weight"] @ x + weights[f"box_head.{layer}.bias"], 0)
            rows.append(weights["box_predictor.cls_score.weight"] @ x + weights["box_predictor.cls_score.bias"])
    return np.stack(rows)


def divergence(student, teacher, temperature):
    """T^2 KL(teacher || student), mean over the RoIs, one class after the other."""
    total = 0.0
    for ours, theirs in zip(student, teacher):
        p, q = (np.exp(row / temperature) / np.exp(row / temperature).sum() for row in (theirs, ours))
        total += sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p)))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("options", [{}, {"kd": {"temperature": 4.0}}])
def test_kd_is_the_divergence_of_both_heads_on_the_students_proposals(talkative, teacher, batch, options):
    student = talkative()
    alone = copy.deepcopy(student).train()
    model = distill(student, teacher, *(node("kd:3", OPTIONS=options) if options else node("kd:3"))).train()
    seen = []
    student.roi_heads.box_pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    losses = step(model, batch)
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_transfer_kd"]
    plain = step(alone, batch)
    assert all(torch.equal(losses[name], plain[name]) for name in plain), "the student's own losses stay"
    assert len(seen) == 1
    assert [len(boxes) for boxes in seen[0]] == [32, 32, 32]
    again, theirs = talkative().double().train(), copy.deepcopy(teacher).double().eval()
    pixels, _ = again.preprocess([item["image"].double() for item in batch])
    with torch.no_grad():
        said = by_hand(again, again.backbone(pixels), seen[0]), by_hand(theirs, theirs.backbone(pixels), seen[0])
    # 1 unless it is given (Chen et al. 2017)
    expected = 3 * divergence(*said, temperature=4.0 if options else 1.0)
    assert expected > 0.1
    assert float(losses["loss_transfer_kd"].detach()) == pytest.approx(expected, rel=1e-4)


def test_dkd_reads_the_class_of_each_proposal(talkative, teacher, batch):
    student = talkative()
    model = distill(student, teacher, *node("dkd:3")).train()
    seen, learned, losses_of = [], [], student.roi_heads.losses
    student.roi_heads.box_predictor.register_forward_hook(lambda *given: seen.append(given[2][0].detach()))
    teacher.roi_heads.box_predictor.cls_score.register_forward_hook(lambda *given: seen.append(given[2].detach()))
    student.roi_heads.losses = lambda *given: (learned.append(given[-1]), losses_of(*given))[1]
    losses = step(model, batch)
    (labels,) = learned
    assert {3} < set(labels.tolist())
    ours, theirs = (np.exp(logits.double().numpy()) for logits in seen)
    total = 0.0
    for mine, wanted, label in zip(ours, theirs, labels.tolist()):
        p, q = wanted / wanted.sum(), mine / mine.sum()
        target = sum(a * math.log(a / b) for a, b in ((p[label], q[label]), (1 - p[label], 1 - q[label])))
        rest = [(p[k] / (1 - p[label]), q[k] / (1 - q[label])) for k in range(4) if k != label]
        # mdistiller's factors for detectors
        total += target + 0.25 * sum(a * math.log(a / b) for a, b in rest)
    assert float(losses["loss_transfer_dkd"].detach()) == pytest.approx(3 * total / len(labels), rel=1e-4)
    losses["loss_transfer_dkd"].backward()
    assert all(value.grad is None for name, value in student.named_parameters() if "proposal_generator" in name)


def test_fgd_reads_the_boxes_of_the_objects(talkative, teacher, batch):
    student = talkative()
    model = distill(student, teacher, *node("fgd", LEVELS=["p2", "p3"])).train()
    found = step(model, batch)["loss_transfer_fgd"]
    same = talkative().train()
    pixels, _ = same.preprocess([item["image"] for item in batch])
    height, width = pixels.shape[2:]
    shares = [item["boxes"].float() / torch.tensor([width, height, width, height]) for item in batch]
    assert {len(of_image) for of_image in shares} > {0}
    with torch.no_grad():
        mine, theirs = same.backbone(pixels), teacher.backbone(pixels)
        (term,) = model.transfer.terms["fgd"].values()
        levels = ("p2", "p3")
        maps = ([given[level] for level in levels] for given in (mine, theirs))
        expected = sum(term(*maps, [compute_now] * 2, shares))
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("term", ["dkd", "fgd"])
def test_images_without_objects_are_background(talkative, teacher, batch, term):
    model = distill(talkative(), teacher, *node(term)).train()
    empty = [{**item, "boxes": item["boxes"][:0], "labels": item["labels"][:0]} for item in batch]
    loss = step(model, empty)[f"loss_transfer_{term}"]
    loss.backward()
    assert float(loss.detach()) > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.student.parameters())


def test_gradient_reaches_the_students_backbone_and_box_head_alone(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node()).train()
    before = copy.deepcopy(teacher.state_dict())
    step(model, batch)["loss_transfer_kd"].backward()
    reached = {name for name, parameter in model.student.named_parameters() if parameter.grad is not None}
    assert {"backbone.bottom_up.model.conv1.weight", "roi_heads.box_head.fc1.weight"} <= reached
    assert "roi_heads.box_predictor.cls_score.weight" in reached
    assert not any("proposal_generator" in name or "bbox_pred" in name for name in reached)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_all_kinds_of_terms_together(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node("kd+vid-logits+lp+nst-poly")).train()
    losses = step(model, batch)
    for name in ("kd", "vid-logits", "lp", "nst-poly"):
        assert losses[f"loss_transfer_{name}"].isfinite()
        assert losses[f"loss_transfer_{name}"] != 0
    # a linear mean from the student's 32 numbers a RoI to the teacher's 3 classes and the background
    mean = model.transfer.terms["vid-logits"]["embedding:logits"].mean
    assert mean.weight.shape == (4, 32)


def test_images_without_any_proposal_give_zero(talkative, teacher, batch):
    model = distill(talkative(), teacher, *node()).train()
    model.student.proposal_generator.forward = lambda maps, limits, _: (
        torch.zeros(1, 5, 4), torch.zeros(1, 5, dtype=torch.bool), {"loss_rpn_cls": maps["p3"].sum() * 0}
    )  # fmt: skip
    loss = step(model, [batch[2]])["loss_transfer_kd"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.student.parameters())


def test_other_classes_are_one_line_unless_no_term_compares_them(talkative, small, batch):
    other = build_detector(small({**WIDE, "MODEL.ROI_HEADS.NUM_CLASSES": 7}), 1)
    with pytest.raises(UserError, match="METHOD kd.nst-poly: kd .* 3 classes and the teacher 7"):
        distill(talkative(), other, *node("kd+nst-poly"))
    model = distill(talkative(), other, *node("vid-logits+lp")).train()
    assert step(model, batch)["loss_transfer_vid-logits"].isfinite()


def test_a_detector_without_such_a_box_head_is_one_line(talkative, teacher):
    student, sigmoid = talkative(), talkative()
    student.roi_heads = torch.nn.ModuleList()
    sigmoid.roi_heads.box_predictor.use_sigmoid_ce = True
    for detector, named in ((student, "METHOD kd: .*ModuleList"), (sigmoid, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE")):
        with pytest.raises(UserError, match=named):
            distill(detector, teacher, *node())


@pytest.mark.detectron2
def test_both_engines_agree(talkative, teacher, small_words, base_file, exhaustive, batch):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    from nst_det.detectron2.config import load_config
    from nst_det.detectron2.modeling import box_outputs

    inputs = with_instances(batch)
    ours = talkative(exhaustive)
    their_student, their_teacher = (build_model(load_config(base_file, small_words(c))) for c in (exhaustive, WIDE))
    their_student.load_state_dict(ours.state_dict())
    their_teacher.load_state_dict(teacher.state_dict())
    losses = []
    for pair, images in (
        ((ours, teacher), batch),
        ((their_student, their_teacher), inputs),
        # a student of one engine and a teacher of the other
        ((their_student, teacher), inputs),
    ):
        torch.manual_seed(1)
        model = distill(*pair, *node("kd+vid-logits+lp+nst-poly+dkd+reviewkd+fgd"), box_outputs).train()
        with EventStorage(0):
            losses.append(step(model, images))
    for other in losses[1:]:
        assert list(other) == list(losses[0])
        for name, value in losses[0].items():
            assert float(other[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4), name


@pytest.mark.detectron2
def test_c4_heads_of_detectron2():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from nst_det.detectron2.modeling import box_outputs

    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = "cpu", 18, 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3, 4
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 30, 16
    torch.manual_seed(0)
    student, teacher = build_model(cfg), build_model(cfg)
    # without normalization by statistics features are large, so that weights must be small
    torch.nn.init.normal_(student.roi_heads.box_predictor.cls_score.weight, std=1e-5)
    torch.nn.init.normal_(teacher.roi_heads.box_predictor.cls_score.weight, std=1e-4)
    objects = Instances((64, 64))
    objects.gt_boxes, objects.gt_classes = Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0]])), torch.tensor([1])
    item = {"image": torch.rand(3, 64, 64) * 255, "instances": objects}
    model = distill(student, teacher, *node(), box_outputs).train()
    asked, answered = [], []
    student.roi_heads.pooler.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    student.roi_heads.box_predictor.register_forward_hook(lambda *said: answered.append(said[2][0]))
    with EventStorage(0):
        loss = step(model, [item])["loss_transfer_kd"]
    # the teacher's own way from its maps to its logits
    with torch.no_grad():
        maps = teacher.backbone(teacher.preprocess_image([item]).tensor)
        pooled = teacher.roi_heads.res5(teacher.roi_heads.pooler([maps["res4"]], asked[0]))
        target = teacher.roi_heads.box_predictor(pooled.mean(dim=[2, 3]))[0]
    expected = divergence(answered[0].detach().double().numpy(), target.double().numpy(), 1.0)
    assert expected > 0.01
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
