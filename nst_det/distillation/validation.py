"""What students are worth on held-out images: by their labels, or without any, by a teacher and a labelled folder.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst_det.distillation.accuracy import Scores, measure
from nst_det.distillation.build import Teacher
from nst_det.distillation.config import AGREEMENT, CKA, LINEAR
from nst_det.distillation.dataloader import Batch, Normalizer, StageOneData
from nst_det.engine.device import autocast
from nst_det.engine.distributed import gathered
from nst_det.engine.progress import waiting
from nst_det.losses import ModelOutputs
from nst_det.models import forward_outputs
from nst_det.models.build import evaluating

# of a vote, as Wu et al. 2018 (arXiv 1805.01978) and DINO have it
TEMPERATURE = 0.07
QUERIES = 1024
LINEAR_STEPS = 200
# outputs for normalized images
Ask = Callable[[Tensor], ModelOutputs]


class Seen(NamedTuple):
    """What a network says of N images, on the host."""

    embedding: Tensor  # (N, D) float32
    best: Tensor | None  # (N,) its most certain class; None where it has none


class Validation:
    """Measures networks on the validation images; ``teacher`` is what agreement is with, None for a teacher itself."""

    def __init__(self, data: StageOneData, teacher: Teacher | None = None) -> None:
        self.data, self.teacher = data, teacher
        self._taught: Seen | None = None

    def __call__(self, networks: Mapping[str, nn.Module], precision: torch.dtype | None) -> dict[str, Scores]:
        """Return the scores of each network; its mode is put back."""
        if self.data.config.DATA.LABELS:
            return measure(networks, self.data.evaluation("val"), self.data.normalize, precision)

        def ask(network: nn.Module) -> Ask:
            def asked(images: Tensor) -> ModelOutputs:
                with autocast(images.device, precision):
                    return forward_outputs(network, images, {})

            return asked

        with ExitStack() as modes:
            for network in networks.values():
                modes.enter_context(evaluating(network))
            return self.without_labels({name: ask(network) for name, network in networks.items()})

    def without_labels(self, networks: Mapping[str, Ask]) -> dict[str, Scores]:
        """Return the accuracy of each network's features on the labelled folder, then its agreement with the teacher.

        Either is there only where there is such a folder, or a teacher.
        """
        scores: dict[str, Scores] = {name: {} for name in networks}
        probe, normalize = self.data.config.TEST.PROBE, self.data.normalize
        if self.data.probe is not None:
            bank, bank_labels = see(networks, self.data.evaluation("neighbors"), normalize)
            asked, labels = see(networks, self.data.evaluation("queries"), normalize)
            for name in networks:
                seen = (bank[name].embedding, bank_labels, asked[name].embedding)
                known, known_labels, new = (part.to(normalize.device) for part in seen)
                found = (
                    linear_probe(known, known_labels, new)
                    if probe.BY == LINEAR
                    else nearest(known, known_labels, new, probe.NEIGHBORS)
                )
                scores[name][probe.BY] = float((found.cpu() == labels).double().mean())
        if self.teacher is not None:
            if self._taught is None:
                self._taught = see({"": self.teacher.raw}, self.data.evaluation("val"), normalize)[0][""]
            found_of, _ = see(networks, self.data.evaluation("val"), normalize)
            for name, (embedding, best) in found_of.items():
                if best is not None and self._taught.best is not None:
                    scores[name][AGREEMENT] = float((best == self._taught.best).double().mean())
                # features that are the same for all images say nothing
                scores[name][CKA] = torch.tensor(linear_cka(embedding, self._taught.embedding)).nan_to_num().item()
        return scores


def see(networks: Mapping[str, Ask], batches: Iterable[Batch], normalize: Normalizer) -> tuple[dict[str, Seen], Tensor]:
    """Return what each network says of the images of all processes' batches, and their labels (N,)."""
    said: dict[str, list[Seen]] = {name: [] for name in networks}
    labels = []
    with torch.no_grad(), waiting("evaluation"):
        for batch in batches:
            images = normalize(batch.images)
            labels.append(batch.labels)
            for name, ask in networks.items():
                outputs = ask(images)
                assert outputs.embedding is not None
                best = None if outputs.logits is None else outputs.logits.argmax(1).cpu()
                said[name].append(Seen(outputs.embedding.float().cpu(), best))
    shares = gathered((said, labels))

    def joined(name: str) -> Seen:
        embeddings, best = zip(*(one for share, _ in shares for one in share[name]))
        return Seen(torch.cat(embeddings), None if best[0] is None else torch.cat(best))

    return {name: joined(name) for name in networks}, torch.cat([one for _, share in shares for one in share])


def nearest(bank: Tensor, labels: Tensor, queries: Tensor, neighbors: int) -> Tensor:
    """Return the classes (M,) of ``queries`` (M, D) by a vote of their nearest features in ``bank`` (N, D).

    Nearest by cosine; each of them votes for its label (N,) with exp(cosine / :data:`TEMPERATURE`).
    """
    bank, found = F.normalize(bank), []
    for part in F.normalize(queries).split(QUERIES):
        cosines, places = (part @ bank.T).topk(min(neighbors, len(bank)))
        votes = torch.zeros(len(part), int(labels.max()) + 1, device=bank.device)
        votes.scatter_add_(1, labels[places], (cosines / TEMPERATURE).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


def linear_probe(bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Return the classes (M,) of ``queries`` (M, D) by a linear classifier of standardized features ``bank`` (N, D).

    It is multinomial logistic regression with the penalty of scikit-learn's default, |W|^2 / 2N beside the mean loss.
    """
    mean, std = bank.double().mean(0), bank.double().std(0).clamp_min(1e-6)
    x, y = ((part.double() - mean) / std for part in (bank, queries))
    weight = x.new_zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = x.new_zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=LINEAR_STEPS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + weight.square().sum() / (2 * len(x))
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    return (y @ weight + bias).argmax(1)


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Compute the linear centered kernel alignment of representations (P, C) and (P, D) of the same P points.

    With columns centered, ``|Y'X|^2 / (|X'X| |Y'Y|)`` in Frobenius norms (Kornblith et al. 2019, arXiv 1905.00414,
    equation 3): 0..1, NaN where one is the same at all points.  With fewer points than channels any two are near 1.
    """
    x, y = (part.double() - part.double().mean(0) for part in (first, second))
    cross = torch.linalg.matrix_norm(y.T @ x).square()
    return float(cross / (torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)))
