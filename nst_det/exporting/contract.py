"""What an exported detector's file says of itself: how it is called, and what it gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nst_det.errors import UserError

# of the entry in ONNX's metadata_props, OpenVINO's rt_info, and (with .json) torch.export's extra files
KEY = "nst_det"
INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels", "batch_index")
# what is the same in every file, for readers without this package
CALL = {
    "input": {"name": INPUT, "layout": "NCHW", "type": "uint8", "channels": "RGB", "range": [0, 255]},
    "outputs": {
        "boxes": "(N, 4) float32: xmin, ymin, xmax, ymax in pixels of the resized image",
        "scores": "(N,) float32, 0 to 1, the best of each image first",
        "labels": "(N,) int64, indices into classes",
        "batch_index": "(N,) int64, which image of the batch",
    },
    "resize": "Pillow's bilinear filter: the shortest side to min_size, the longest to max_size at most; 0: as it is",
}


@dataclass(frozen=True)
class Contract:
    """What differs between files.

    Attributes:
        classes: their names by label.
        batch: images that are given at once, of one size.
        precision: ``fp32``, ``fp16`` or ``int8``.
        min_size: pixels of the shortest side after resizing; 0 leaves images as they are.
        max_size: pixels that the longest side has at most.
        score_threshold: detections with a lower score are not given.
        thresholds: by class, the least score that is recommended.
    """

    classes: tuple[str, ...]
    batch: int
    precision: str
    min_size: int
    max_size: int
    score_threshold: float
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as the text that a file holds."""
        return json.dumps({**dataclasses.asdict(self), **CALL}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, path: str | Path) -> Contract:
        """Read it from the text in the file ``path``; None where the file has none."""
        remedy = "name a file that nst-det export wrote"
        if text is None:
            raise UserError(f"{path}: says nothing of how to call it, so another project made it; {remedy}")
        try:
            told: dict[str, Any] = json.loads(text)
            named = {part.name: told[part.name] for part in dataclasses.fields(cls)}
            given = cls(**{**named, "classes": tuple(map(str, named["classes"])), "batch": int(named["batch"])})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: its entry {KEY} can't be read ({error!r}); {remedy}") from error
        if any(told.get(key) != value for key, value in CALL.items()):
            raise UserError(f"{path}: is called in another way ({KEY} in it), by another version; export it again")
        return given
