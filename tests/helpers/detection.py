"""Batches and weights of detectors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def same_bits(one: Mapping | Path, other: Mapping | Path) -> bool:
    """Whether two state dicts, or those of the ``model.safetensors`` in two run folders, are equal."""
    first, second = (load_file(each / "model.safetensors") if isinstance(each, Path) else each for each in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def randomize(detector, heads):
    """Give frozen normalization, of either library, and the layers ``heads`` weights that tell boxes apart."""
    for layer in detector.modules():
        if type(layer).__name__ == "FrozenBatchNorm2d":
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.uniform_(0.2, 0.6)
    for layer in heads:
        torch.nn.init.normal_(layer.weight, std=0.1)


def step(model, batch):
    """A forward pass that draws as every other one."""
    torch.manual_seed(0)
    return model(batch)


def with_instances(batch):
    """The batch with its objects as Detectron2 has them too."""
    from detectron2.structures import Boxes, Instances

    items = []
    for item in batch:
        objects = Instances(tuple(item["image"].shape[-2:]))
        objects.gt_boxes, objects.gt_classes = Boxes(item["boxes"]), item["labels"]
        items.append({**item, "instances": objects})
    return items
