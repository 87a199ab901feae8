"""Transfer losses: what a teacher hands to a student, as functions on tensors and as the terms of a method."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nst_det.losses.registry import OWN_TERMS

if TYPE_CHECKING:
    from nst_det.losses.at import at_loss
    from nst_det.losses.cwd import cwd_loss
    from nst_det.losses.dist import dist_loss
    from nst_det.losses.dkd import dkd_loss
    from nst_det.losses.fgd import fgd_loss
    from nst_det.losses.fitnet import hint_loss
    from nst_det.losses.kd import kd_loss
    from nst_det.losses.locality_preserving import lp_loss
    from nst_det.losses.loss import TransferLoss, build_transfer, pair_shapes
    from nst_det.losses.loss_balance import TermBalance, gradient_norms
    from nst_det.losses.method import LABELS_ONLY, Method, parse_method
    from nst_det.losses.mgd import generation_loss
    from nst_det.losses.nst import nst_loss
    from nst_det.losses.outputs import ModelOutputs
    from nst_det.losses.pkd import pkd_loss
    from nst_det.losses.registry import LayerPair, LossSpec, get_term, register_term, terms, unregister_term
    from nst_det.losses.reviewkd import hcl_loss
    from nst_det.losses.rkd import rkd_loss
    from nst_det.losses.sp import sp_loss
    from nst_det.losses.vid import gaussian_nll

__all__ = [
    "LABELS_ONLY",
    "LayerPair",
    "LossSpec",
    "Method",
    "ModelOutputs",
    "TermBalance",
    "TransferLoss",
    "at_loss",
    "build_transfer",
    "cwd_loss",
    "dist_loss",
    "dkd_loss",
    "fgd_loss",
    "gaussian_nll",
    "generation_loss",
    "get_term",
    "gradient_norms",
    "hcl_loss",
    "hint_loss",
    "kd_loss",
    "lp_loss",
    "nst_loss",
    "pair_shapes",
    "parse_method",
    "pkd_loss",
    "register_term",
    "rkd_loss",
    "sp_loss",
    "terms",
    "unregister_term",
]

# the files that have them; all but the first need torch, which takes seconds to import
_FILES = ("method", *OWN_TERMS, "loss", "loss_balance", "outputs", "registry")


def __getattr__(name: str) -> Any:
    for file in _FILES if name in __all__ else ():
        module = import_module(f"{__name__}.{file}")
        if name in vars(module):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
