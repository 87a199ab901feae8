#!/usr/bin/env bash
# torch.optim.SGD(fused=True) with momentum, under a GradScaler whose first step is skipped, steps by memory that was never set.
#
# torch 2.14.1, CPU: a scaler begins with a scale of 65,536, so that the first gradients often overflow and the step is
# skipped.  The fused optimizer is called even so, with found_inf 1; it makes its momentum by empty_like, leaves it unset
# since the step is skipped, and keeps it in its state.  The next step is then no first one: it adds the gradient to
# whatever the memory held.  Unfused SGD isn't called when a step is skipped, and is right.
# Seen: a weight that starts at 0 and has the gradient 1 at the second step, learning rate 0.1: unfused -0.1; fused
# -0.7300, where the memory held 7 (-0.1 (0.9 * 7 + 1)), or other numbers.
# Exit code 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.14.1" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch

SIZE = 1000


def weights_after_two_steps(fused: bool) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for gradient in (torch.full((SIZE,), torch.inf), torch.ones(SIZE)):
        optimizer.zero_grad()
        scaler.scale((weight * gradient).sum()).backward()
        # what earlier work leaves in the allocator's free memory
        left = [torch.full((SIZE,), 7.0) for _ in range(100)]
        del left
        scaler.step(optimizer)
        scaler.update()
    return weight.detach()


torch.set_num_threads(1)
unfused, fused = (weights_after_two_steps(kind) for kind in (False, True))
print(f"unfused: {unfused.min():.4f} to {unfused.max():.4f}; fused: {fused.min():.4f} to {fused.max():.4f}")
sys.exit(not (torch.allclose(unfused, torch.tensor(-0.1)) and not torch.allclose(fused, unfused)))
PYTHON
