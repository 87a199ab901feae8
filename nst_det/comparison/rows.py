"""The rows of detectors that another start or another detector makes: the keys that each one adds in stage two."""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from nst_det.comparison.result import COCO, IMAGENET, NO_FPN, SCRATCH, TEACHER
from nst_det.comparison.stages import DISTILL, errors_of, merge_stage
from nst_det.engine.config import expand_path
from nst_det.errors import UserError

# each row that ROWS may name, and the key of DETECT with its own settings
ROW_OPTS = {
    SCRATCH: "SCRATCH_OPTS",
    IMAGENET: "IMAGENET_OPTS",
    COCO: "COCO_OPTS",
    NO_FPN: "NO_FPN_OPTS",
    TEACHER: "TEACHER_OPTS",
}
# the keys of the row teacher's network -> those of stage one's TEACHER that they are taken from
TEACHER_NETWORK = {"MODEL.TIMM.ARCH": "ARCH", "MODEL.TIMM.KWARGS": "ARCH_KWARGS"}


def published_weights(distill: CfgNode, given: Sequence[str], source: str) -> tuple[str, ...]:
    """Return KEY VALUE pairs for a detector on the student's published weights, unless ``given`` names some."""
    student = distill.STUDENT
    if "MODEL.WEIGHTS" in given[::2]:
        return ()
    if student.WEIGHTS:
        return ("MODEL.WEIGHTS", expand_path(student.WEIGHTS, f"{DISTILL}.STUDENT.WEIGHTS"))
    if student.PRETRAINED:
        return ("MODEL.TIMM.PRETRAINED", "True")
    raise UserError(
        f"{source}: ROWS: imagenet needs published weights of {student.ARCH}; name them: DETECT.IMAGENET_OPTS "
        "[MODEL.WEIGHTS, FILE], or DISTILL.STUDENT.WEIGHTS, from which all students begin too"
    )


def teacher_pixels(distill: CfgNode) -> tuple[str, ...]:
    """Return KEY VALUE pairs for a detector on a teacher whose images have another mean or std than the students'."""
    own = {f"MODEL.PIXEL_{key}": [round(255 * value, 3) for value in distill.TEACHER[key]] for key in ("MEAN", "STD")}
    return tuple(str(word) for pair in own.items() if pair[1] for word in pair)


def published_detector(detect: CfgNode, given: Sequence[str], source: str) -> tuple[str, ...]:
    """Return KEY VALUE pairs for the detector whose weights ``given`` names, as far as its file tells them."""
    where = f"{source}: DETECT.{ROW_OPTS[COCO]}"
    config = merge_stage(detect, given, where)
    with errors_of(where):
        named = expand_path(config.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        if "MODEL.WEIGHTS" not in given[::2] or "://" in named:
            raise UserError(
                "ROWS: coco begins with a detector's weights; name their file: [MODEL.WEIGHTS, FILE], such as "
                "torchvision's fasterrcnn_resnet50_fpn_coco or Detectron2's faster_rcnn_R_50_FPN_3x, downloaded before"
            )
        # torch takes seconds to import
        from nst_det.detection.zoo import zoo_keys
        from nst_det.models.io import trusting_pickles

        with trusting_pickles(config.TRUST_PICKLE):
            return tuple(str(word) for pair in zoo_keys(named).items() for word in pair)


def without_fpn(detect: CfgNode) -> tuple[str, ...]:
    """Return KEY VALUE pairs for a detector without FPN: proposals, boxes and all anchors on the map of stride 16."""
    if detect.MODEL.BACKBONE.NAME != "build_timm_fpn_backbone":
        raise UserError(
            f"ROWS: no-fpn: DETECT.MODEL.BACKBONE.NAME {detect.MODEL.BACKBONE.NAME} can't have its FPN taken out; "
            "build_timm_fpn_backbone can"
        )
    anchors = detect.MODEL.ANCHOR_GENERATOR
    sizes, ratios = (
        sorted({value for row in rows for value in row}) for rows in (anchors.SIZES, anchors.ASPECT_RATIOS)
    )
    settings = {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [sizes],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios],
    }
    return tuple(str(word) for pair in settings.items() for word in pair)
