#!/usr/bin/env bash
# torch on the CPU: with one thread, 1 x 1 convolutions of fewer than 16 images in float32 leave oneDNN.
#
# torch 2.14.1, x86: pointwise convolutions without stride (most of ResNets', MobileNets' and FPNs' layers) take oneDNN's
# kernels with two threads or with 16 images; with one thread and at most 15 images they are copied into
# columns and multiplied (_slow_conv2d_forward), in training and in inference.  So torch.set_num_threads(1), by which runs
# are done side by side, changes more than the number of cores, and a time measured with 16 images isn't one of 8.
# Seen (threads, images, kernel):
#   1 15 _slow_conv2d_forward, 1 16 mkldnn_convolution, 2 15 mkldnn_convolution, 2 16 mkldnn_convolution
# Exit code 1 if other kernels are taken.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "torch==2.14.1" "numpy<3"
"$folder/env/bin/python" - <<'PYTHON'
import sys

import torch
from torch.profiler import ProfilerActivity, profile

layer = torch.nn.Conv2d(112, 672, 1, bias=False)
print("torch", torch.__version__)


def kernel(threads, images):
    torch.set_num_threads(threads)
    x = torch.randn(images, 112, 12, 12)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        layer(x)
    (name,) = {e.key[6:] for e in seen.key_averages() if "_slow_conv2d_forward" in e.key or "mkldnn_conv" in e.key}
    print(threads, images, name)
    return name


found = [kernel(1, 15), kernel(1, 16), kernel(2, 15), kernel(2, 16)]
sys.exit(0 if found == ["_slow_conv2d_forward", *["mkldnn_convolution"] * 3] else "changed")
PYTHON
