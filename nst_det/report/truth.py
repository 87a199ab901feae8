"""The ground truth that a detector was tested on, found by its run's own config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from nst_det.runtime.config import expand_path
from nst_det.runtime.files import read_json


@dataclass(frozen=True)
class Truth:
    """One test image.

    ``boxes`` are (N, 4) xyxy in 0-based continuous pixels, ``labels`` N class names, ``difficult`` N flags.
    """

    image_id: str
    path: Path
    boxes: NDArray[np.float64]
    labels: tuple[str, ...]
    difficult: NDArray[np.bool_]


def read_truth(config_file: Path) -> list[Truth]:
    """All test images of a run, in the order of the split.

    Args:
        config_file: a run's ``config.json`` (dotted keys); DATASETS.TEST names entries of DATASETS.VOC.

    Raises:
        UserError: the config or the data can't be read any more.
    """
    truth = []
    # classes given, so that they are not looked for in the annotations: only names are used here
    for data in open_test(config_file, ("any",)):
        for id_ in data.ids:
            found = data.annotation(id_)
            boxes = found.boxes.astype(np.float64)
            truth.append(Truth(id_, data.image_path(id_), boxes, found.names, found.difficult))
    return truth


def open_test(config_file: Path, classes: Sequence[str]) -> list[VocDataset]:
    """The data sets that a run was tested on.

    Args:
        config_file: as :func:`read_truth` takes it.
        classes: class names in the order of their labels.

    Raises:
        UserError: the config or the data can't be read any more.
    """
    config = read_json(config_file)
    names = _value(config, "DATASETS.TEST", config_file)
    opened = []
    for name in [names] if isinstance(names, str) else names:
        root, split = (_value(config, f"DATASETS.VOC.{name}.{field}", config_file) for field in ("ROOT", "SPLIT"))
        opened.append(VocDataset(expand_path(root, f"DATASETS.VOC.{name}.ROOT"), split, classes))
    return opened


def _value(config: Any, key: str, file: Path) -> Any:
    if not isinstance(config, dict) or not config.get(key):
        raise UserError(f"{file}: {key} is missing; the report can't find the test images")
    return config[key]
