"""The Detectron2 engine.  Importing this package does not import Detectron2; the first use of one of its names does.

- ``modeling``: timm bottom-ups in Detectron2's ``BACKBONE_REGISTRY``, RoI heads whose canonical box size can be set
- ``checkpoint``: backbone files and ``backbone://NAME`` in Detectron2's checkpointer
- ``config``, ``data``, ``evaluator``: VOC roots by name, batches that depend on seed and step alone, VOC AP
- ``trainer``, ``train_net``, ``replay``: the trainer, its command, and a non-finite step run again
- ``api``: three lines for somebody's own Detectron2 project
- ``parity``: the same weights on both engines
"""

import importlib
from typing import Any

from nst_det.detection.config import INSTALL_PAGE
from nst_det.detection.config import engine_is_installed as is_available
from nst_det.errors import UserError

# public name -> the file it lives in
_HOMES = {
    "DistillTrainer": "trainer",
    "TimmBackbone": "modeling",
    "VocEvaluator": "evaluator",
    "add_config": "config",
    "build_teacher": "api",
    "distill": "api",
    "load_config": "config",
    "main": "train_net",
    "rebuild": "replay",
    "register_voc": "data",
}
__all__ = [*_HOMES, "INSTALL_PAGE", "is_available", "require"]


def require() -> None:
    """Import Detectron2; raise UserError where it is not installed, or its build doesn't fit this PyTorch."""
    if not is_available():
        raise UserError(f"Detectron2 is not installed; see {INSTALL_PAGE}, or set ENGINE torchvision")
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        raise UserError(
            f"Detectron2 is installed but can't be loaded ({error}); build it for this PyTorch, see {INSTALL_PAGE}"
        ) from error


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    require()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
