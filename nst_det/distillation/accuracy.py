"""Top-1 and top-5 of several networks in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nst_det.distillation.dataloader import Batch
from nst_det.engine.distributed import gathered


@dataclass(frozen=True)
class Accuracy:
    """Fractions of images, 0..1; ``top5`` is among the five best, or all classes where there are fewer."""

    top1: float
    top5: float


def correct_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of a batch have the right class first, and among the first five: (2,) int64.

    Args:
        logits: (B, K).
        labels: (B,).
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum()])


def measure(
    networks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    normalize: Callable[[Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[None]],
) -> dict[str, Accuracy]:
    """The accuracy of every network, in evaluation mode, on the same batches; training modes are put back.

    Args:
        networks: classifiers by name; ``network(images)`` gives logits (B, classes).
        batches: the validation split, or this process's share of it; what all found is added up.
        normalize: uint8 images (B, 3, H, W) to what the networks take.
        autocast: the precision in which the networks were trained.
    """
    training = {name: network.training for name, network in networks.items()}
    counts = {name: torch.zeros(2, dtype=torch.long) for name in networks}
    total = 0
    for network in networks.values():
        network.eval()
    with torch.no_grad():
        for batch in batches:
            images = normalize(batch.images)
            labels = batch.labels.to(images.device)
            total += len(labels)
            for name, network in networks.items():
                with autocast():
                    logits = network(images)
                counts[name] = counts[name].to(images.device) + correct_counts(logits.float(), labels)
    shares = gathered((total, {name: count.cpu() for name, count in counts.items()}))
    total = sum(share for share, _ in shares)
    counts = {name: torch.stack([found[name] for _, found in shares]).sum(0) for name in networks}
    for name, network in networks.items():
        network.train(training[name])
    return {name: Accuracy(*(count.double() / max(total, 1)).tolist()) for name, count in counts.items()}
