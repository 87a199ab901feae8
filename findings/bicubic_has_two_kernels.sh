#!/usr/bin/env bash
# Bicubic enlargement isn't the same with and without antialias, so a ViT's features depend on the library.
#
# torch 2.14.1, timm 1.0.31, transformers 5.0.0: antialias is there for reduction, and with bilinear it changes nothing
# where a map is enlarged.  With bicubic it takes the other cubic kernel (a = -0.5, as Pillow does, instead of -0.75).
# timm resizes the position embeddings of a ViT with antialias, transformers without: at any size but the one trained at,
# larger ones too, the same weights get other positions, and a teacher's features change with the library it is from.
# Seen (norm of the difference, divided by that of the embeddings, from 14 x 14 to 28, 20, 14 and 8 a side):
#   bicubic  0.084 0.082 0.000 0.638    bilinear 0.000 0.000 0.000 0.573    timm and transformers 0.084 0.082 0.000 0.638
# Exit code 1 if one of these changes by more than 0.002.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" \
    "transformers==5.0.0" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import timm
import torch
import transformers
from timm.layers import resample_abs_pos_embed
from torch.nn.functional import interpolate
from transformers.models.vit.modeling_vit import ViTConfig, ViTEmbeddings

SIDES, PATCH, WIDTH = (28, 20, 14, 8), 16, 64
torch.manual_seed(0)
positions = torch.randn(1, 1 + 14 * 14, WIDTH)
maps = positions[:, 1:].transpose(1, 2).reshape(1, WIDTH, 14, 14)


def difference(one, other):
    return round(((one - other).norm() / other.norm()).item(), 3)


def of_torch(mode):
    plain = [interpolate(maps, size=(side, side), mode=mode, align_corners=False) for side in SIDES]
    smooth = [interpolate(maps, size=(side, side), mode=mode, align_corners=False, antialias=True) for side in SIDES]
    return [difference(one, other) for one, other in zip(smooth, plain)]


def of_libraries():
    embeddings = ViTEmbeddings(ViTConfig(hidden_size=WIDTH, image_size=14 * PATCH, patch_size=PATCH))
    embeddings.position_embeddings.data = positions
    found = []
    for side in SIDES:
        tokens = torch.zeros(1, 1 + side * side, WIDTH)
        theirs = embeddings.interpolate_pos_encoding(tokens, side * PATCH, side * PATCH)[:, 1:]
        found.append(difference(resample_abs_pos_embed(positions, [side, side])[:, 1:], theirs))
    return found


print("torch", torch.__version__, "timm", timm.__version__, "transformers", transformers.__version__)
expected = {
    "bicubic": [0.084, 0.082, 0.0, 0.638],
    "bilinear": [0.0, 0.0, 0.0, 0.573],
    "timm and transformers": [0.084, 0.082, 0.0, 0.638],
}
with torch.no_grad():
    seen = {"bicubic": of_torch("bicubic"), "bilinear": of_torch("bilinear"), "timm and transformers": of_libraries()}
for name, values in seen.items():
    print(name, *values)
changed = [n for n, values in expected.items() if any(abs(a - b) > 0.002 for a, b in zip(values, seen[n]))]
sys.exit(f"changed: {', '.join(changed)}" if changed else 0)
PYTHON
