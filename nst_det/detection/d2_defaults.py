"""Detectron2's keys as the torchvision engine honors them: their defaults, and the values it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nst_det.engine.keys import (
    CLIP_TYPE,
    CLIP_TYPES,
    CUDNN_BENCHMARK,
    FLOAT32_PRECISION,
    Key,
    are_numbers,
    at_least,
    one_of,
)

# keys and groups that Detectron2 has and this engine doesn't; naming one is an error
DETECTRON2_ONLY = (
    "DATALOADER.REPEAT_SQRT",
    "DATALOADER.REPEAT_THRESHOLD",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "GLOBAL",
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

CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


def _rising(count: int) -> Callable[[Any], bool]:
    return lambda given: are_numbers(given, count) and list(given) == sorted(given)


HONORED: dict[str, Key] = {
    "VERSION": one_of("of Detectron2's config format", 2),
    "OUTPUT_DIR": Key("./output", "the folder of the run"),
    "SEED": Key(-1, "of all random draws; a negative one is drawn by chance"),
    "CUDNN_BENCHMARK": CUDNN_BENCHMARK,
    "FLOAT32_PRECISION": FLOAT32_PRECISION,
    "VIS_PERIOD": one_of("steps between pictures of the training data", 0),
    "MODEL.LOAD_PROPOSALS": one_of("proposals from files in place of the RPN's", False),
    "MODEL.MASK_ON": one_of("predict masks", False),
    "MODEL.KEYPOINT_ON": one_of("predict keypoints", False),
    "MODEL.DEVICE": Key("cuda", "cpu, cuda, cuda:1, or auto: the GPU where there is one"),
    "MODEL.META_ARCHITECTURE": one_of("kind of detector", "GeneralizedRCNN"),
    "MODEL.WEIGHTS": Key("", "a backbone file, backbone://NAME, or the weights of a whole detector"),
    "MODEL.PIXEL_MEAN": Key(
        [103.53, 116.28, 123.675], "subtracted from pixels on the 0..255 scale, in the order of INPUT.FORMAT"
    ),
    "MODEL.PIXEL_STD": Key([1.0, 1.0, 1.0], "what they are then divided by"),
    "MODEL.BACKBONE.NAME": one_of(
        "what makes the feature maps", "build_timm_fpn_backbone", "build_timm_backbone", default="build_resnet_backbone"
    ),
    "MODEL.BACKBONE.FREEZE_AT": one_of(
        "the bottom-up's first parts that are not trained: 1 is the stem, 2 the stem and res2, ...",
        *range(6),
        default=2,
    ),
    "MODEL.FPN.IN_FEATURES": Key([], "levels of the bottom-up that the FPN is built on"),
    "MODEL.FPN.OUT_CHANNELS": Key(256, "channels of every level of the FPN"),
    "MODEL.FPN.NORM": one_of("normalization in the FPN", ""),
    "MODEL.FPN.FUSE_TYPE": one_of("how a level and the one above it are joined", "sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.NAME": one_of("what proposes boxes", "RPN"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": Key(0, "smaller proposals are dropped, pixels"),
    "MODEL.ANCHOR_GENERATOR.NAME": one_of(
        "what makes the anchors; with RoundedAnchorGenerator their corners are whole pixels from a cell's, as "
        "torchvision's",
        "DefaultAnchorGenerator",
        "RoundedAnchorGenerator",
    ),
    "MODEL.ANCHOR_GENERATOR.SIZES": Key(
        [[32, 64, 128, 256, 512]],
        "sides of the anchors in pixels, a list for each level of RPN.IN_FEATURES, or one for all",
    ),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": Key([[0.5, 1.0, 2.0]], "height / width of the anchors, likewise"),
    "MODEL.ANCHOR_GENERATOR.OFFSET": Key(0.0, "of the first anchor's center from the corner, in strides"),
    "MODEL.RPN.HEAD_NAME": one_of("the RPN's head", "StandardRPNHead"),
    "MODEL.RPN.IN_FEATURES": Key(["res4"], "levels that boxes are proposed from"),
    "MODEL.RPN.BOUNDARY_THRESH": Key(-1, "pixels by which an anchor may extend beyond the image; -1 sets no limit"),
    "MODEL.RPN.IOU_THRESHOLDS": Key(
        [0.3, 0.7],
        "overlaps below which an anchor is background, and from which it is an object",
        "two numbers, the smaller first",
        _rising(2),
    ),
    "MODEL.RPN.IOU_LABELS": one_of("labels between these thresholds", [0, -1, 1]),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": Key(256, "anchors of an image that the loss takes"),
    "MODEL.RPN.POSITIVE_FRACTION": Key(0.5, "largest share of objects among them"),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": one_of("loss of the boxes", "smooth_l1"),
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": Key(1.0, "its weight"),
    "MODEL.RPN.BBOX_REG_WEIGHTS": Key((1.0, 1.0, 1.0, 1.0), "by which the offsets of a box are multiplied"),
    "MODEL.RPN.SMOOTH_L1_BETA": Key(0.0, "the difference at which smooth L1 turns from quadratic to linear; 0 is L1"),
    "MODEL.RPN.LOSS_WEIGHT": Key(1.0, "weight of the RPN's losses"),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": Key(12000, "proposals per level before NMS, in training"),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": Key(6000, "the same at test time"),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": Key(2000, "proposals per image after NMS, in training"),
    "MODEL.RPN.POST_NMS_TOPK_TEST": Key(1000, "the same at test time"),
    "MODEL.RPN.NMS_THRESH": Key(0.7, "overlap from which the weaker of two proposals is dropped"),
    "MODEL.RPN.CONV_DIMS": Key([-1], "channels of the RPN's convolutions; -1 is those of its input"),
    "MODEL.ROI_HEADS.NAME": one_of(
        "kind of heads; CanonicalROIHeads is the Detectron2 engine's, for heads that read the canonical keys",
        "StandardROIHeads",
        "CanonicalROIHeads",
        default="Res5ROIHeads",
    ),
    "MODEL.ROI_HEADS.NUM_CLASSES": at_least("classes of objects; 0 takes those of the data", 0, default=80),
    "MODEL.ROI_HEADS.IN_FEATURES": Key(["res4"], "levels that boxes are pooled from"),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": Key(
        [0.5], "overlap from which a proposal is an object", "a list of one number", _rising(1)
    ),
    "MODEL.ROI_HEADS.IOU_LABELS": one_of("labels on both sides of it", [0, 1]),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": Key(512, "proposals of an image that the loss takes"),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": Key(0.25, "largest share of objects among them"),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": Key(0.05, "least score of a detection"),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": Key(
        0.5, "overlap from which the weaker of two detections of a class is dropped"
    ),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": Key(True, "add the true boxes to the proposals in training"),
    "MODEL.ROI_BOX_HEAD.NAME": one_of("kind of box head", "FastRCNNConvFCHead", default=""),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": one_of("loss of the boxes", "smooth_l1"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": Key(1.0, "its weight"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": Key((10.0, 10.0, 5.0, 5.0), "by which the offsets of a box are multiplied"),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": Key(
        0.0, "the difference at which smooth L1 turns from quadratic to linear; 0 is L1"
    ),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": Key(14, "cells on a side that a box is pooled into"),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": Key(0, "samples on a side of a cell; 0 takes as many as it has pixels"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": one_of(
        "how boxes are pooled; V2 takes the half-pixel offset into account", "ROIAlignV2", "ROIAlign"
    ),
    "MODEL.ROI_BOX_HEAD.NUM_FC": Key(0, "fully connected layers"),
    "MODEL.ROI_BOX_HEAD.FC_DIM": Key(1024, "their units"),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": Key(0, "convolutions before them"),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": Key(256, "their channels"),
    "MODEL.ROI_BOX_HEAD.NORM": one_of("normalization of the convolutions", ""),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": Key(False, "one box for all classes, not one for each"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": one_of("train on predicted boxes", False),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": one_of("federated loss", False),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": one_of("a sigmoid for each class in place of the softmax", False),
    "INPUT.MIN_SIZE_TRAIN": Key(
        (800,), "shortest side of a training image, pixels: one of these, or from the range of two"
    ),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("which of the two", "choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": Key(1333, "limit on the longest side, pixels"),
    "INPUT.MIN_SIZE_TEST": at_least("shortest side at test time; 0 leaves images as they are", 0, default=800),
    "INPUT.MAX_SIZE_TEST": Key(1333, "limit on the longest side at test time"),
    "INPUT.RANDOM_FLIP": one_of("mirror half of the training images", "horizontal", "vertical", "none"),
    "INPUT.CROP.ENABLED": Key(False, "cut a part out of each training image, before it is resized"),
    "INPUT.CROP.TYPE": one_of(
        "how large it is: relative is SIZE times the image's height and width, relative_range at least that, absolute "
        "SIZE in pixels, absolute_range height and width each from the range of the two",
        *CROP_TYPES,
    ),
    "INPUT.CROP.SIZE": Key([0.9, 0.9], "height and width, as TYPE says"),
    "INPUT.FORMAT": one_of("order of the channels", "BGR", "RGB"),
    "DATASETS.TRAIN": Key((), "data sets to train on, names in DATASETS.VOC"),
    "DATASETS.TEST": Key((), "the data set to evaluate on"),
    "DATALOADER.NUM_WORKERS": at_least(
        "processes that load images; 0 does it in this process; -1 takes 0 on a CPU, and with a GPU one for "
        "each core of the run, up to 8",
        -1,
        default=4,
    ),
    "DATALOADER.ASPECT_RATIO_GROUPING": Key(True, "don't mix wide and tall images in a batch"),
    "DATALOADER.SAMPLER_TRAIN": one_of("order of the training images", "TrainingSampler"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": Key(True, "leave out images without an object to train on"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "learning rate times GAMMA at each of STEPS, or falling to BASE_LR_END", "WarmupMultiStepLR", "WarmupCosineLR"
    ),
    "SOLVER.MAX_ITER": at_least("steps", 1, default=40000),
    "SOLVER.BASE_LR": Key(0.001, "learning rate"),
    "SOLVER.BASE_LR_END": Key(0.0, "where WarmupCosineLR ends"),
    "SOLVER.MOMENTUM": Key(0.9, "of SGD"),
    "SOLVER.NESTEROV": Key(False, "Nesterov's momentum"),
    "SOLVER.WEIGHT_DECAY": Key(0.0001, "of weights"),
    "SOLVER.WEIGHT_DECAY_NORM": Key(0.0, "of normalization layers"),
    "SOLVER.GAMMA": Key(0.1, "of WarmupMultiStepLR"),
    "SOLVER.STEPS": Key((30000,), "of WarmupMultiStepLR"),
    "SOLVER.WARMUP_FACTOR": Key(0.001, "where the rate begins, as a part of BASE_LR"),
    "SOLVER.WARMUP_ITERS": at_least("steps in which it rises to its schedule's", 0, default=1000),
    "SOLVER.WARMUP_METHOD": one_of("linearly, or in one jump at the end", "linear", "constant"),
    "SOLVER.RESCALE_INTERVAL": Key(False, "rescale the schedule to the steps after the warm-up"),
    "SOLVER.CHECKPOINT_PERIOD": at_least("steps between checkpoints", 1, default=5000),
    "SOLVER.IMS_PER_BATCH": at_least("images of a step, of all processes together", 1, default=16),
    "SOLVER.REFERENCE_WORLD_SIZE": one_of("number of processes to scale the schedule from", 0),
    "SOLVER.BIAS_LR_FACTOR": Key(1.0, "learning rate of biases as a part of the others'"),
    "SOLVER.WEIGHT_DECAY_BIAS": Key(None, "of biases; None takes WEIGHT_DECAY"),
    "SOLVER.CLIP_GRADIENTS.ENABLED": Key(False, "clip gradients"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(CLIP_TYPE, *CLIP_TYPES),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Key(1.0, "the limit"),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Key(2.0, "which p-norm"),
    "SOLVER.AMP.ENABLED": Key(False, "mixed precision"),
    "TEST.EXPECTED_RESULTS": one_of("figures to compare the result with", []),
    "TEST.EVAL_PERIOD": at_least(
        "steps between evaluations on the validation split (without one, on DATASETS.TEST); 0 for none", 0, default=0
    ),
    "TEST.DETECTIONS_PER_IMAGE": Key(100, "most detections on an image"),
    "TEST.AUG.ENABLED": one_of("augmentation at test time", False),
    "TEST.PRECISE_BN.ENABLED": one_of("measure the statistics of batch normalization anew", False),
}
