"""The outputs of a network for one batch: all that a transfer loss sees of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class ModelOutputs:
    """Logits, feature maps and embedding of one network for one batch.

    A teacher's are made once per batch and handed to the losses of all students: what they need of it in
    another form (normalized maps, Gram matrices, soft targets) is computed by the first that asks and kept here.

    Attributes:
        logits: (B, K), unnormalized class scores.
        maps: level name to feature map (B, C, H, W).
        embedding: (B, D), the pooled vector before the classifier.
        labels: (B,) int64, the class of each image, on the student's side.
        boxes: (N, 4) objects of each image, there too: xmin, ymin, xmax, ymax in shares of the maps' width and height.

    Example:
        >>> teacher = ModelOutputs(logits=torch.zeros(2, 10), maps={"res4": torch.rand(2, 8, 7, 7)})
        >>> teacher.shared("mean", lambda: teacher.maps["res4"].mean()).ndim
        0
    """

    logits: Tensor | None = None
    maps: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None
    labels: Tensor | None = None
    boxes: list[Tensor] | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def shared(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the value kept under ``key``; the first call computes it, without gradient."""
        if key not in self._memo:
            with torch.no_grad():
                self._memo[key] = compute()
        return self._memo[key]

    def keep(self, key: Hashable, value: Any) -> None:
        """Put ``value`` where :meth:`shared` finds it."""
        self._memo[key] = value

    def shared_so_far(self) -> dict[Hashable, Any]:
        """Return all that was asked of :meth:`shared`, by key."""
        return dict(self._memo)

    def images(self, rows: Any) -> ModelOutputs:
        """Return the outputs for some images (a slice, or indices), without what losses share."""
        return ModelOutputs(
            None if self.logits is None else self.logits[rows],
            {level: value[rows] for level, value in self.maps.items()},
            None if self.embedding is None else self.embedding[rows],
            None if self.labels is None else self.labels[rows],
            None if self.boxes is None else [self.boxes[row] for row in torch.arange(len(self.boxes))[rows].tolist()],
        )

    def tensors(self) -> list[Tensor]:
        """Return all outputs there are."""
        return [value for value in (self.logits, *self.maps.values(), self.embedding) if value is not None]

    def truth(self, name: str) -> dict[str, Any]:
        """Return the annotation that a loss is called with by keyword: ``labels``, ``boxes``, or nothing for ""."""
        if name and getattr(self, name) is None:
            raise ValueError(f"no {name} among the outputs, but a transfer term reads them")
        return {name: getattr(self, name)} if name else {}

    def of(self, kind: str, level: str = "") -> Tensor:
        """Return the output of one kind: ``logits``, ``embedding``, or the map of ``level`` for ``maps``."""
        if kind == "maps":
            if level not in self.maps:
                raise ValueError(f"no map '{level}' among the outputs; there are {', '.join(self.maps) or 'none'}")
            return self.maps[level]
        value: Tensor | None = self.logits if kind == "logits" else self.embedding
        if value is None:
            raise ValueError(f"no {kind} among the outputs, but a transfer term reads them")
        return value
