"""Figures that the papers print, by method, so that a report can put them beside its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nst_det.comparison.result import MAP, TOP1, Measure


@dataclass(frozen=True)
class Published:
    """One table (of several columns: one of them); figures are percent, and one a method, without a spread."""

    what: str  # networks and data
    source: str
    measure: Measure
    figures: Mapping[str, float]
    top1: Mapping[str, float] = field(default_factory=dict)  # of the backbones of detectors


def _accuracies(errors: Mapping[str, float]) -> dict[str, float]:
    return {method: round(100 - error, 2) for method, error in errors.items()}


# NST is the polynomial kernel where a table doesn't say; VID's own workshop paper calls it MI
_NST = 'Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", '
_CVPR = (
    'Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, table of images a class, as '
    "quoted by sseung0703/Variational_Information_Distillation"
)
_WORKSHOP = 'Ahn et al., "Variational Mutual Information Distillation for Transfer Learning", NeurIPS 2018 workshop, '
_SLIDES = "Z. Hu's slides on VID (February 2019), page 35"
_REFILLED = (
    "VID's table of networks as quoted by njulus/ReFilled, whose own runs the students without a teacher may be (the "
    "row ce)"
)
_WIDE = "WRN-16-1 from WRN-40-2, CIFAR-10, "
_IMAGENET_ERRORS = {
    **{"ce": 25.74, "kd": 24.56, "fitnet": 25.30, "at": 25.10, "nst-poly": 24.82},
    **{"kd+fitnet": 24.48, "kd+at": 24.64, "kd+nst-poly": 24.34},
}
_CIFAR_ERRORS = {
    "ce": (5.80, 25.63),
    "kd": (4.47, 22.18),
    "fitnet": (4.75, 23.48),
    "at": (4.64, 24.31),
    "nst-linear": (4.87, 24.28),
    "nst-poly": (4.39, 23.46),
    "nst-gaussian": (4.48, 23.85),
    "kd+fitnet": (4.54, 22.29),
    "kd+nst-poly": (4.21, 21.48),
    "kd+fitnet+nst-poly": (4.54, 22.25),
}
_IMAGES = (5000, 1000, 500, 100)
_BY_IMAGES = {
    "ce": (90.72, 84.67, 79.63, 58.84),
    "kd": (91.27, 86.11, 82.23, 64.24),
    "fitnet": (90.64, 84.78, 80.73, 68.90),
    "at": (91.60, 87.26, 84.94, 73.40),
    "vid": (91.85, 89.73, 88.09, 81.59),
}
_BY_IMAGES_WORKSHOP = {
    "ce": (90.71, 85.21, 79.82, 59.59),
    "kd": (91.34, 85.39, 81.88, 65.94),
    "fitnet": (90.97, 86.45, 83.71, 76.07),
    "at": (91.51, 87.28, 84.46, 75.18),
    "vid": (91.76, 88.71, 86.49, 78.14),
    "kd+at": (91.81, 87.34, 85.01, 76.29),
    "kd+vid": (91.70, 88.59, 86.53, 78.48),
}
# the other images are there without labels; the students without a teacher can't use them
_BY_LABELS = {
    "ce": _BY_IMAGES_WORKSHOP["ce"][1:],
    "kd": (91.33, 91.30, 91.29),
    "fitnet": (85.25, 82.03, 76.85),
    "at": (89.30, 88.72, 86.34),
    "vid": (90.33, 90.23, 89.03),
    "kd+at": (91.56, 91.81, 91.34),
    "kd+vid": (91.57, 91.44, 91.34),
}
_MLPS = (4096, 2048, 1024)
_BY_MLP = {
    "ce": (70.60, 70.78, 70.90),
    "kd": (70.42, 70.53, 70.79),
    "fitnet": (76.02, 74.08, 72.91),
    "vid": (85.18, 83.47, 78.57),
}
_STUDENTS = ("40-2", "16-2", "40-1", "16-1")
_BY_STUDENT = {
    "ce": (74.44, 70.15, 68.97, 65.44),
    "kd": (75.47, 71.87, 70.46, 66.54),
    "fitnet": (74.29, 70.89, 68.66, 65.38),
    "at": (74.76, 71.06, 69.85, 65.31),
    "nst-poly": (74.81, 71.19, 68.00, 64.95),
    "vid": (75.25, 73.31, 71.51, 66.32),
    "kd+vid": (76.11, 73.69, 72.16, 67.19),
}


def _column(table: Mapping[str, tuple[float, ...]], at: int) -> dict[str, float]:
    return {method: figures[at] for method, figures in table.items()}


OF_DETECTORS = "nst-voc07"
# by the name that a config has
PUBLISHED = {
    OF_DETECTORS: Published(
        "Faster R-CNN with a BN-Inception student of ImageNet, fine-tuned on PASCAL VOC 2007",
        f"{_NST}table 4; top-1 of the backbones: table 3",
        MAP,
        {"ce": 75.6, "kd": 76.0, "fitnet": 76.6, "at": 76.5, "nst-poly": 76.8, "kd+nst-poly": 77.2},
        _accuracies(_IMAGENET_ERRORS),
    ),
    "nst-imagenet": Published(
        "Inception-BN from ResNet-101, ImageNet, single crop", f"{_NST}table 3", TOP1, _accuracies(_IMAGENET_ERRORS)
    ),
    **{
        f"nst-{data.lower().replace('-', '')}": Published(
            f"simplified Inception-BN from ResNet-1001, {data}",
            f"{_NST}tables 1 and 2",
            TOP1,
            _accuracies(_column(_CIFAR_ERRORS, at)),
        )
        for at, data in enumerate(("CIFAR-10", "CIFAR-100"))
    },
    **{
        f"vid-cifar10-{count}": Published(f"{_WIDE}{count} images a class", _CVPR, TOP1, _column(_BY_IMAGES, at))
        for at, count in enumerate(_IMAGES)
    },
    **{
        f"vid-workshop-{count}": Published(
            f"{_WIDE}{count} images a class", f"{_WORKSHOP}table 1a", TOP1, _column(_BY_IMAGES_WORKSHOP, at)
        )
        for at, count in enumerate(_IMAGES)
    },
    **{
        f"vid-unlabelled-{count}": Published(
            f"{_WIDE}{count} labels a class, all other images without (ce: without these images)",
            f"{_WORKSHOP}table 1b; ce: table 1a",
            TOP1,
            _column(_BY_LABELS, at),
        )
        for at, count in enumerate(_IMAGES[1:])
    },
    **{
        f"vid-mlp-{width}": Published(
            f"a perceptron with {width} units a layer from WRN-40-2, CIFAR-10", _SLIDES, TOP1, _column(_BY_MLP, at)
        )
        for at, width in enumerate(_MLPS)
    },
    **{
        f"vid-cifar100-{student}": Published(
            f"WRN-{student} from WRN-40-2, CIFAR-100", _REFILLED, TOP1, _column(_BY_STUDENT, at)
        )
        for at, student in enumerate(_STUDENTS)
    },
}
