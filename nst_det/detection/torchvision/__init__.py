"""The detector that Detectron2 would build from the same config, without Detectron2.

Operators are torchvision's; what joins them follows Detectron2 wherever the two libraries differ, see the table in
docs/detectron2.md.  The names in the state dict are Detectron2's, so that either engine reads the other's files::

    backbone.bottom_up.model.*            the timm network by timm's names (``backbone.model.*`` without FPN)
    backbone.{fpn_lateral,fpn_output}{2..5}.{weight,bias}
    proposal_generator.rpn_head.{conv,objectness_logits,anchor_deltas}.{weight,bias}
    roi_heads.box_head.{conv1..,fc1..}.{weight,bias}
    roi_heads.box_predictor.{cls_score,bbox_pred}.{weight,bias}
"""

from nst_det.detection.torchvision.detector import Detector, build_detector

__all__ = ["Detector", "build_detector"]
