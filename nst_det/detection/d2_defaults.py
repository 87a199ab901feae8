"""Detectron2's keys as the torchvision engine honors them: their defaults, and the values it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from nst_det.engine.config import CLIP_TYPES, FLOAT32_PRECISIONS


class Limited(NamedTuple):
    """The default of a key that takes some values only."""

    default: Any
    wanted: str
    takes: Callable[[Any], bool]


def one_of(*values: Any, default: Any = None) -> Limited:
    """Limit a key to some values; the first is the default, unless that is none of them."""
    return Limited(values[0] if default is None else default, " or ".join(map(repr, values)), values.__contains__)


def at_least(least: int, default: int) -> Limited:
    """Limit a key to numbers from ``least`` on."""
    return Limited(default, f"at least {least}", lambda value: bool(value >= least))


# keys and groups that Detectron2 has and this engine doesn't; naming one is an error
DETECTRON2_ONLY = (
    "DATALOADER.REPEAT_SQRT",
    "DATALOADER.REPEAT_THRESHOLD",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "GLOBAL",
    "INPUT.CROP.SIZE",
    "INPUT.CROP.TYPE",
    "INPUT.MASK_FORMAT",
    "MODEL.ANCHOR_GENERATOR.ANGLES",
    "MODEL.PANOPTIC_FPN",
    "MODEL.RESNETS",
    "MODEL.RETINANET",
    "MODEL.ROI_BOX_CASCADE_HEAD",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ROI_KEYPOINT_HEAD",
    "MODEL.ROI_MASK_HEAD",
    "MODEL.SEM_SEG_HEAD",
    "SOLVER.NUM_DECAYS",
    "TEST.AUG.FLIP",
    "TEST.AUG.MAX_SIZE",
    "TEST.AUG.MIN_SIZES",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.PRECISE_BN.NUM_ITER",
)

# what they mean is documented by Detectron2
HONORED: dict[str, Any] = {
    "VERSION": one_of(2),
    "OUTPUT_DIR": "./output",
    "SEED": -1,
    "CUDNN_BENCHMARK": False,
    "FLOAT32_PRECISION": one_of(*FLOAT32_PRECISIONS, default=""),
    "VIS_PERIOD": one_of(0),
    "MODEL.LOAD_PROPOSALS": one_of(False),
    "MODEL.MASK_ON": one_of(False),
    "MODEL.KEYPOINT_ON": one_of(False),
    "MODEL.DEVICE": "cuda",
    "MODEL.META_ARCHITECTURE": one_of("GeneralizedRCNN"),
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.BACKBONE.NAME": one_of("build_timm_fpn_backbone", "build_timm_backbone", default="build_resnet_backbone"),
    "MODEL.BACKBONE.FREEZE_AT": one_of(*range(6), default=2),
    "MODEL.FPN.IN_FEATURES": [],
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.FPN.NORM": one_of(""),
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.NAME": one_of("RPN"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
    "MODEL.ANCHOR_GENERATOR.NAME": one_of("DefaultAnchorGenerator"),
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128, 256, 512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.RPN.HEAD_NAME": one_of("StandardRPNHead"),
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.RPN.BOUNDARY_THRESH": -1,
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.IOU_LABELS": one_of([0, -1, 1]),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": one_of("smooth_l1"),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 1.0,
    "MODEL.RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
    "MODEL.RPN.SMOOTH_L1_BETA": 0.0,
    "MODEL.RPN.LOSS_WEIGHT": 1.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 12000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.RPN.CONV_DIMS": [-1],
    # the second name is the Detectron2 engine's, for heads that read the canonical keys
    "MODEL.ROI_HEADS.NAME": one_of("StandardROIHeads", "CanonicalROIHeads", default="Res5ROIHeads"),
    "MODEL.ROI_HEADS.NUM_CLASSES": at_least(0, default=80),
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.IOU_LABELS": one_of([0, 1]),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": True,
    "MODEL.ROI_BOX_HEAD.NAME": one_of("FastRCNNConvFCHead", default=""),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": one_of("smooth_l1"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 1.0,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": one_of("ROIAlignV2", "ROIAlign"),
    "MODEL.ROI_BOX_HEAD.NUM_FC": 0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 256,
    "MODEL.ROI_BOX_HEAD.NORM": one_of(""),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": one_of(False),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": one_of(False),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": one_of(False),
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": at_least(0, default=800),
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.ENABLED": one_of(False),
    "INPUT.FORMAT": one_of("BGR", "RGB"),
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
    "DATALOADER.NUM_WORKERS": at_least(-1, default=4),
    "DATALOADER.ASPECT_RATIO_GROUPING": True,
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.MAX_ITER": at_least(1, default=40000),
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.BASE_LR_END": 0.0,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.NESTEROV": False,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.STEPS": (30000,),
    "SOLVER.WARMUP_FACTOR": 0.001,
    "SOLVER.WARMUP_ITERS": at_least(0, default=1000),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.RESCALE_INTERVAL": False,
    "SOLVER.CHECKPOINT_PERIOD": at_least(1, default=5000),
    "SOLVER.IMS_PER_BATCH": at_least(1, default=16),
    "SOLVER.REFERENCE_WORLD_SIZE": one_of(0),
    "SOLVER.BIAS_LR_FACTOR": 1.0,
    "SOLVER.WEIGHT_DECAY_BIAS": None,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(*CLIP_TYPES),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "SOLVER.AMP.ENABLED": False,
    "TEST.EXPECTED_RESULTS": one_of([]),
    "TEST.EVAL_PERIOD": at_least(0, default=0),
    "TEST.DETECTIONS_PER_IMAGE": 100,
    "TEST.AUG.ENABLED": one_of(False),
    "TEST.PRECISE_BN.ENABLED": one_of(False),
}
