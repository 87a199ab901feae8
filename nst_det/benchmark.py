"""What a network costs: parameters, arithmetic, latency, throughput.

Two words are kept apart.  A MAC is one multiplication with the addition that follows it, which is what many papers
print as "FLOPs"; here a FLOP is a single operation, so that a MAC counts as two.  fvcore counts the MACs of
convolutions and matrix products, and single operations for normalization, pooling of features and resizing.  It has
no count for element-wise operations, box decoding, RoIAlign and NMS: those are listed as uncounted.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from nst_det.models import count_parameters

# operators of which fvcore's count is one per multiply-add; of all others it is one per operation
MAC_OPERATORS = frozenset({"conv", "addmm", "bmm", "einsum", "matmul", "linear"})
PERCENTILES = (10.0, 50.0, 90.0)
WARMUP = 3
# a detector's default image is as wide as most photographs, or as a backbone's where its config resizes nothing
PHOTO_ASPECT = 4 / 3
BACKBONE_SIZE = (224, 224)


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of one forward pass.

    Attributes:
        macs: multiply-adds of convolutions and matrix products.
        flops: ``2 * macs`` plus the single operations of what else fvcore counts.
        uncounted: operators that fvcore has no count for, with how often they come.
    """

    macs: int
    flops: int
    uncounted: dict[str, int]


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass of ``batch`` images, over ``repeats`` passes; throughput by the median."""

    batch: int
    repeats: int
    p10: float
    median: float
    p90: float

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.batch / self.median


class Pixels(nn.Module):
    """A detector that takes a batch as one tensor and gives plain tensors, as a tracer wants it.

    Args:
        detector: in evaluation mode.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), 0..255, to boxes, scores and labels, image after image."""
        found = self.detector([{"image": image} for image in images])
        return tuple(item[name] for item in found for name in ("boxes", "scores", "labels"))


def photo_size(config: CfgNode) -> tuple[int, int]:
    """(height, width) in pixels of a photograph of 4:3 after the resizing of a detection config's tests."""
    from nst_det.detection.data import resized_shape

    short, largest = config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST
    return resized_shape(short, round(PHOTO_ASPECT * short), short, largest) if short else BACKBONE_SIZE


def count_arithmetic(model: nn.Module, images: Tensor) -> Arithmetic:
    """Count the arithmetic of ``model(images)`` by fvcore.

    Args:
        model: in evaluation mode; gives a tensor, or tuples of them.
        images: (B, 3, H, W); the count is of the whole batch.

    Example:
        >>> count_arithmetic(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16)).macs
        55296
    """
    with torch.no_grad(), warnings.catch_warnings():
        # the tracer warns at every size that depends on the data, which is what we want of it: this image's path
        warnings.simplefilter("ignore")
        logger = logging.getLogger("fvcore.nn.jit_analysis")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            analysis = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            counts, uncounted = analysis.by_operator(), analysis.unsupported_ops()
        finally:
            logger.setLevel(level)
    macs = round(sum(count for name, count in counts.items() if name in MAC_OPERATORS))
    others = round(sum(count for name, count in counts.items() if name not in MAC_OPERATORS))
    return Arithmetic(macs, 2 * macs + others, {name: int(times) for name, times in sorted(uncounted.items())})


def measure_latency(
    call: Callable[[], Any],
    batch: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
) -> Latency:
    """Time a call after :data:`WARMUP` calls that don't count.

    Args:
        call: one forward pass.
        batch: its number of images.
        repeats: calls that count.
        clock: seconds.
        wait: waits for the device to finish; called before each reading of the clock.
    """
    for _ in range(WARMUP):
        call()
    seconds = []
    for _ in range(repeats):
        wait()
        start = clock()
        call()
        wait()
        seconds.append(clock() - start)
    p10, median, p90 = np.percentile(seconds, PERCENTILES).tolist()
    return Latency(batch, repeats, p10, median, p90)


@torch.no_grad()
def benchmark(
    model: nn.Module,
    size: tuple[int, int],
    batches: Sequence[int],
    repeats: int,
    device: torch.device,
    parameters: int | None = None,
) -> dict[str, Any]:
    """Everything about one network on one device.

    Images are noise of one seed, 0..255.  How long a detector takes depends on how many boxes it keeps, so measure
    the trained one.

    Args:
        model: takes (B, 3, H, W); is put into evaluation mode.
        size: (height, width) of the images, pixels.
        batches: batch sizes.
        repeats: passes that count, for each batch size.
        device: where the model and the images go.
        parameters: stated count; None counts those of ``model``.

    Returns:
        ``parameters``, ``macs`` and ``flops`` of one image, ``uncounted``, and ``latency``: a dict a batch size with
        ``batch``, ``repeats``, ``p10``, ``median``, ``p90`` (seconds a batch) and ``images_per_second``.
    """
    model = model.to(device).eval()
    generator = torch.Generator().manual_seed(0)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    image = (torch.rand(1, 3, *size, generator=generator) * 255).to(device)
    arithmetic = count_arithmetic(model, image)
    rows = []
    for batch in batches:
        images = image.expand(batch, -1, -1, -1).contiguous()
        latency = measure_latency(lambda images=images: model(images), batch, repeats, wait=wait)  # type: ignore[misc]
        rows.append({**asdict(latency), "images_per_second": latency.images_per_second})
    return {
        "parameters": count_parameters(model) if parameters is None else parameters,
        **asdict(arithmetic),
        "latency": rows,
    }
