#!/usr/bin/env bash
# A reduction with a wider dtype copies the whole tensor first on the CPU.
#
# torch 2.14.1: x.sum(dtype=torch.float64), x.mean(dtype=...) and torch.linalg.vector_norm(x, dtype=...) read as "add up
# in float64", and look like the way to a precise sum without the memory of x.double().  On the CPU they allocate a
# float64 copy of x all the same, also where one dimension alone is reduced.  A bfloat16 tensor's plain .mean() allocates
# a float32 copy of it without any dtype being named.  For a (B, C, C) batch of kernel matrices that is twice their memory
# at the peak.
# Seen (MiB allocated by each, for a float32 and a bfloat16 tensor of 4096 x 4096, that is 64 and 32 MiB):
#   sum float64 128, mean float64 128, sum of rows float64 128, vector_norm float64 128, mean 0, bfloat16 mean 64
# Exit code 1 if any of them allocates something else.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.14.1" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
from torch.profiler import ProfilerActivity, profile

x = torch.rand(4096, 4096)
half = x.bfloat16()
wide = torch.float64
expected = {
    "sum float64": (lambda: x.sum(dtype=wide), 128),
    "mean float64": (lambda: x.mean(dtype=wide), 128),
    "sum of rows float64": (lambda: x.sum(dim=1, dtype=wide), 128),
    "vector_norm float64": (lambda: torch.linalg.vector_norm(x, dtype=wide), 128),
    "mean": (lambda: x.mean(), 0),
    "bfloat16 mean": (lambda: half.mean(), 64),
}
print("torch", torch.__version__)
changed = []
for name, (reduce, mib) in expected.items():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        reduce()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in seen.key_averages()) / 2**20
    print(f"{name}: {allocated:.0f} MiB")
    if abs(allocated - mib) > 1:
        changed.append(name)
sys.exit(f"changed: {', '.join(changed)}" if changed else 0)
PYTHON
