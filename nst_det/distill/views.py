"""A fixed number of augmented views of every training image: view v of an image has the same pixels in every run."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from nst_det.distill.augment import crops_and_colors, moved
from nst_det.distill.store import ImageStore
from nst_det.runtime.seeds import derive_seed


class Views:
    """The views of all images, numbered in rows: row ``view * images + image``.

    A view's draws depend on (seed, view, image) alone, not on the batch that the image is in, so that what a teacher
    said about it can be kept.

    Args:
        store: training images.
        augment: the DATA.AUGMENT node.
        count: views of each image.
        seed: of the draws.
    """

    def __init__(self, store: ImageStore, augment: CfgNode, count: int, seed: int) -> None:
        self.store, self.augment, self.count, self.seed = store, augment, count, seed
        self._single = bool(augment.CROP_AREA or augment.COLOR_JITTER)
        self._moves: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Rows in all."""
        return self.count * len(self.store)

    def rows(self, epoch: int, indices: Tensor) -> Tensor:
        """The rows (B,) of images (B,) in an epoch: its view is ``epoch mod count``."""
        return epoch % self.count * len(self.store) + indices

    def images(self, rows: Tensor) -> Tensor:
        """The pixels of rows (B,): (B, 3, S, S) uint8."""
        indices = rows % len(self.store)
        images = self._cropped(rows) if self._single else self.store.squares(indices)
        if not self.augment.SHIFT and not self.augment.HFLIP:
            return images
        # a batch has images of two views where one epoch ends in it
        offsets = torch.empty((2, len(rows)), dtype=torch.long)
        mirrored = torch.empty(len(rows), dtype=torch.bool)
        views = rows // len(self.store)
        for view in views.unique().tolist():
            here = views == view
            all_offsets, all_mirrored = self._moves_of(view)
            offsets[:, here] = all_offsets[:, indices[here]].long()
            mirrored[here] = all_mirrored[indices[here]]
        return moved(images, offsets, mirrored)

    def _cropped(self, rows: Tensor) -> Tensor:
        transform = crops_and_colors(self.store.size, self.augment)
        images = []
        with torch.random.fork_rng(devices=[]):
            for row in rows.tolist():
                view, index = divmod(row, len(self.store))
                torch.default_generator.manual_seed(derive_seed(self.seed, "view", view, index))
                images.append(transform(self.store[index]))
        return torch.stack(images)

    def _moves_of(self, view: int) -> tuple[Tensor, Tensor]:
        """Offsets (2, N) and mirror flags (N,) of all images in a view."""
        if view not in self._moves:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "moves", view))
            count, shift = len(self.store), self.augment.SHIFT
            offsets = torch.randint(-shift, shift + 1, (2, count), generator=generator, dtype=torch.int16)
            self._moves[view] = offsets, torch.rand(count, generator=generator) < self.augment.HFLIP
        return self._moves[view]
