"""Transfer knowledge from a big network to a small detector, and measure which way of doing it helps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nst_det.api import (
        compare,
        distill,
        evaluate_voc,
        export,
        init,
        load_backbone,
        load_detector,
        predict,
    )

__version__ = "0.1.0"
__all__ = ["compare", "distill", "evaluate_voc", "export", "init", "load_backbone", "load_detector", "predict"]


def __getattr__(name: str) -> Any:
    # not before they are used: torch takes seconds to import
    if name in __all__:
        return getattr(import_module("nst_det.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
