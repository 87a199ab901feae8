#!/usr/bin/env bash
# A randomly initialized resnet18 of timm and one of torchvision are not the same network to a short schedule.
#
# timm 1.0.31, torchvision 0.29.1: same layers, same number of parameters, interchangeable state dicts.  But timm's default
# zero_init_last=True sets the scale of the last batch normalization of each residual block to 0, so that at the start
# every block is its shortcut and the weights of its convolutions get no gradient at all in the first step; torchvision's
# zero_init_residual is False.  Where students are compared after a few hundred steps, or where maps are matched from the
# first step on, that decides more than most transfer methods do.
# Seen: timm 8 of 8 scales all zero, 16 of 20 convolutions without a gradient; torchvision 0 and 0.
# Exit code 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import timm
import torch
import torchvision

torch.manual_seed(0)
images, seen = torch.randn(4, 3, 64, 64), {}
networks = {"timm": timm.create_model("resnet18"), "torchvision": torchvision.models.resnet18()}
for name, network in networks.items():
    network.train()(images).square().sum().backward()
    zero = sum(bool((weight == 0).all()) for key, weight in network.named_parameters() if key.endswith("bn2.weight"))
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    still = sum(bool((module.weight.grad == 0).all()) for module in convolutions)
    seen[name] = (zero, still, len(convolutions))
    print(f"{name}: {zero} scales all zero, {still} of {len(convolutions)} convolutions without a gradient")
theirs = [network.state_dict() for network in networks.values()]
print("same keys:", sorted(theirs[0]) == sorted(theirs[1]))
sys.exit(seen != {"timm": (8, 16, 20), "torchvision": (0, 0, 20)} or sorted(theirs[0]) != sorted(theirs[1]))
PYTHON
