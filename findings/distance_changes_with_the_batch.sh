#!/usr/bin/env bash
# torch.cdist: the distance of two rows depends on how many other rows there are, and of near ones nothing is left.
#
# torch 2.14.1: up to 25 rows distances are sums of squared differences, from 26 on |x|^2 + |y|^2 - 2 xy in float32 (the
# default compute_mode), which loses what is small beside |x|^2.  With embeddings of length 1, two near rows are then
# nearer to each other (0) than a row is to itself: what relations between the images of a batch (RKD), a Gaussian kernel
# or k-NN take from them changes with the size of the batch.  compute_mode="donot_use_mm_for_euclid_dist" does not.
# Seen (largest distance of a row to itself, and that of rows 0 and 1, which is 9.82e-05 in float64):
#   25 rows 0.0 9.82e-05, 26 rows 7.72e-04 0.0, 26 rows without products 0.0 9.82e-05
# Exit code 1 if 25 and 26 rows agree, or differ without products.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.14.1" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch

torch.manual_seed(0)
rows = torch.nn.functional.normalize(torch.rand(64, 512), dim=1)
rows[1] = rows[0] * (1 + 1e-4 * torch.randn(512))
true = (rows[0].double() - rows[1].double()).norm().item()
print("torch", torch.__version__, f"float64: {true:.3g}")


def distances(count, **mode):
    found = torch.cdist(rows[:count], rows[:count], **mode)
    to_itself, near = found.diagonal().max().item(), found[0, 1].item()
    print(f"{count} rows {mode or ''}: {to_itself:.3g} {near:.3g}")
    return to_itself, near


def right(to_itself, near):
    return to_itself == 0 and abs(near - true) < 1e-3 * true


few, more = distances(25), distances(26)
without = distances(26, compute_mode="donot_use_mm_for_euclid_dist")
as_seen = right(*few) and right(*without) and more[0] > true and more[1] < 0.5 * true
sys.exit(0 if as_seen else "changed")
PYTHON
