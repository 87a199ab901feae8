"""What a network costs: parameters, arithmetic, latency, throughput.

A MAC is one multiplication with the addition that follows it, which many papers print as "FLOPs"; here a FLOP is a
single operation, so that a MAC counts as two.  Convolutions, matrix products and attention are counted, fused or not;
normalization, activations, pooling and resizing are not.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nst_det.models import count_parameters

# passes, and seconds, before those that are timed: a processor that was idle takes a while to reach its speed
WARMUP, WARMUP_SECONDS = 3, 0.5
# a detector's default image is as wide as most photographs, or as a backbone's where its config resizes nothing
PHOTO_ASPECT = 4 / 3
BACKBONE_SIZE = (224, 224)


class Batched(nn.Module):
    """A detector that takes a batch as one tensor, as a backbone does.

    ``detect`` runs a detector that gives its detections in another form than the torchvision engine's.
    """

    def __init__(self, detector: nn.Module, detect: Callable[[nn.Module, Any], Any] = nn.Module.__call__) -> None:
        super().__init__()
        self.detector, self.detect = detector, detect

    def forward(self, images: Tensor) -> Any:
        """Detect on (B, 3, H, W), 0..255."""
        return self.detect(self.detector, [{"image": image} for image in images])


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
def count_arithmetic(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Count ``macs`` and ``flops`` of ``model(images)``, (B, 3, H, W), the batch as a whole.

    Example:
        >>> count_arithmetic(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16))["macs"]
        55296
    """
    with _unfused_attention(), FlopCounterMode(display=False) as counter:
        model(images)
    flops = counter.get_total_flops()
    return {"macs": flops // 2, "flops": flops}


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Compute attention by plain matrix products, since torch counts some fused kernels (the CPU's) as nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def time_passes(call: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of ``repeats`` calls, after some that don't count."""
    # torch.utils.benchmark.Timer gives means of blocks, not single passes, and waits for the current GPU alone
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    start, passes = time.perf_counter(), 0
    while passes < WARMUP or time.perf_counter() - start < WARMUP_SECONDS:
        call()
        passes += 1
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds
