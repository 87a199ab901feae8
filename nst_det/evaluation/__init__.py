"""Detections in, average precision out: PASCAL VOC's and COCO's."""
