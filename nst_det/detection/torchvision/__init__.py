"""The torchvision engine: the detector that Detectron2 would build from the same config, without Detectron2.

Operators and bookkeeping are torchvision's (``roi_align``, ``batched_nms``, ``box_iou``, matcher, sampler, box
coder); what joins them follows Detectron2 wherever the two libraries differ:

====================  ======================================  ==================================================
what                  torchvision's own Faster R-CNN          here, as in Detectron2
====================  ======================================  ==================================================
base anchors          rounded to whole pixels                 not rounded
anchor strides        image size // map size (53 for ``p6``   the level's stride (64)
                      of a 160 pixel image)
classes               background first, labels from 1         labels from 0, background last
box regression rows   one set for background too              one set a class
pixels                0..1, RGB                               0..255, channel order of INPUT.FORMAT
image resize          tensor interpolation inside the model   PIL's bilinear on bytes, outside
RoIAlign              aligned=False                           aligned=True (ROIAlignV2)
RoI to level          +1e-6 inside the logarithm              +1e-8
proposals' NMS        by objectness after the sigmoid         by the logit
small boxes           sides below 1e-2 (1e-3) pixels dropped  empty ones dropped
box losses            smooth L1, beta 1/9                     L1, or smooth L1 by the beta keys
RPN normalizer        anchors that were sampled               BATCH_SIZE_PER_IMAGE times images
====================  ======================================  ==================================================

State dict: the names are Detectron2's, part by part, so that a file written by one engine is read by the other::

    backbone.bottom_up.model.*            the timm network by timm's names (``backbone.model.*`` without FPN)
    backbone.fpn_lateral{2..5}.{weight,bias}
    backbone.fpn_output{2..5}.{weight,bias}
    proposal_generator.rpn_head.{conv,objectness_logits,anchor_deltas}.{weight,bias}
    roi_heads.box_head.{conv1..,fc1..}.{weight,bias}
    roi_heads.box_predictor.{cls_score,bbox_pred}.{weight,bias}

Anchors, pixel mean and pixel std come from the config and are not part of it.
"""

from nst_det.detection.torchvision.detector import Detector, build_detector

__all__ = ["Detector", "build_detector"]
