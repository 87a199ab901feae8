"""What a network costs: parameters, arithmetic, latency, throughput.

A MAC is one multiplication with the addition that follows it, which many papers print as "FLOPs"; here a FLOP is a
single operation, so that a MAC counts as two.  fvcore counts the MACs of convolutions and matrix products, and single
operations of normalization, feature pooling and resizing; what it has no count for is listed as uncounted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from nst_det.models import count_parameters

# operators of which fvcore's count is one per multiply-add; of all others it is one per operation
MAC_OPERATORS = frozenset({"conv", "addmm", "bmm", "einsum", "matmul", "linear"})
WARMUP = 3
# a detector's default image is as wide as most photographs, or as a backbone's where its config resizes nothing
PHOTO_ASPECT = 4 / 3
BACKBONE_SIZE = (224, 224)


class Traceable(nn.Module):
    """A detector that takes a batch as one tensor and gives plain tensors, as a tracer wants it.

    ``detect`` runs a detector that gives its detections in another form than the torchvision engine's.
    """

    def __init__(self, detector: nn.Module, detect: Callable[[nn.Module, Any], Any] = nn.Module.__call__) -> None:
        super().__init__()
        self.detector, self.detect = detector, detect

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Turn (B, 3, H, W), 0..255, into boxes, scores and labels, image after image."""
        found = self.detect(self.detector, [{"image": image} for image in images])
        return tuple(item[name] for item in found for name in ("boxes", "scores", "labels"))


def photo_size(config: CfgNode) -> tuple[int, int]:
    """Return (height, width) in pixels of a photograph of 4:3 after the resizing of a detection config's tests."""
    from nst_det.detection.data import resized_shape

    short, largest = config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST
    return resized_shape(short, round(PHOTO_ASPECT * short), short, largest) if short else BACKBONE_SIZE


@torch.no_grad()
def benchmark(
    model: nn.Module, size: tuple[int, int], batches: Sequence[int], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Measure a network that takes (B, 3, H, W) on one device.

    Images of ``size`` (height, width) are noise of one seed, 0..255.  How long a detector takes depends on how many
    boxes it keeps, so measure the trained one.  ``latency`` has percentiles in seconds for each of ``batches``.
    """
    model = model.to(device).eval()
    image = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255).to(device)
    latency = []
    for batch in batches:
        images = image.expand(batch, -1, -1, -1).contiguous()
        seconds = time_passes(lambda images=images: model(images), repeats, device)  # type: ignore[misc]
        p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
        row = {"batch": batch, "repeats": repeats, "p10": p10, "median": median, "p90": p90}
        latency.append({**row, "images_per_second": batch / median})
    return {"parameters": count_parameters(model), **count_arithmetic(model, image), "latency": latency}


@torch.no_grad()
def count_arithmetic(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Count ``macs``, ``flops`` and ``uncounted`` operators of ``model(images)``, (B, 3, H, W), the batch as a whole.

    Example:
        >>> count_arithmetic(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16))["macs"]
        55296
    """
    analysis = FlopCountAnalysis(model, images)
    # the tracer warns at every size that depends on the data, which is what we want of it: this image's path
    analysis.tracer_warnings("none").unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    macs = round(sum(count for name, count in counts.items() if name in MAC_OPERATORS))
    others = round(sum(count for name, count in counts.items() if name not in MAC_OPERATORS))
    uncounted = {name: int(times) for name, times in sorted(analysis.unsupported_ops().items())}
    return {"macs": macs, "flops": 2 * macs + others, "uncounted": uncounted}


def time_passes(call: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of ``repeats`` calls, after some that don't count."""
    # torch.utils.benchmark.Timer gives means of blocks, not single passes, and waits for the current GPU alone
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    for _ in range(WARMUP):
        call()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds
