"""Top-1 and top-5 of several networks in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nst_det.distillation.dataloader import Batch, Normalizer
from nst_det.engine.device import autocast
from nst_det.engine.distributed import gathered
from nst_det.engine.progress import waiting

# what was measured of a network by name, 0..1, larger is better; the first is what it is judged by
Scores = dict[str, float]


def correct_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many of a batch have the right class first, and among the first five: (2,) int64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum()])


def measure(
    networks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    normalize: Normalizer,
    precision: torch.dtype | None,
) -> dict[str, Scores]:
    """Return top1 and top5 of every network on this process's batches and those of all others; modes are put back.

    ``top5`` is among the five best, or all classes where there are fewer.
    """
    training = [network.training for network in networks.values()]
    for network in networks.values():
        network.eval()
    counts, total = torch.zeros(len(networks), 2, dtype=torch.long, device=normalize.device), 0
    with torch.no_grad(), waiting("evaluation"):
        for batch in batches:
            images, labels = normalize(batch.images), batch.labels.to(normalize.device, non_blocking=True)
            total += len(labels)
            for row, network in zip(counts, networks.values()):
                with autocast(normalize.device, precision):
                    logits = network(images)
                row += correct_counts(logits.float(), labels)
    for network, mode in zip(networks.values(), training):
        network.train(mode)
    shares = gathered((total, counts.cpu()))
    total = sum(count for count, _ in shares)
    fractions = torch.stack([found for _, found in shares]).sum(0).double() / max(total, 1)
    return {name: dict(zip(("top1", "top5"), row)) for name, row in zip(networks, fractions.tolist())}
