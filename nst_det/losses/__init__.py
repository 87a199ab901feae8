"""Transfer losses: what a teacher hands to a student, as functions on tensors and as the terms of a method."""

from nst_det.losses.outputs import ModelOutputs
from nst_det.losses.registry import LayerPair, LossSpec, get_term, register_term, terms, unregister_term

# each of these registers its terms; their order is the order of a method's canonical form
from nst_det.losses.kd import kd_loss  # isort: skip
from nst_det.losses.fitnet import hint_loss  # isort: skip
from nst_det.losses.at import at_loss  # isort: skip
from nst_det.losses.nst import nst_loss  # isort: skip
from nst_det.losses.vid import gaussian_nll  # isort: skip
from nst_det.losses.locality_preserving import lp_loss  # isort: skip
from nst_det.losses.cwd import cwd_loss  # isort: skip
from nst_det.losses.pkd import pkd_loss  # isort: skip
from nst_det.losses.mgd import generation_loss  # isort: skip
from nst_det.losses.sp import sp_loss  # isort: skip
from nst_det.losses.rkd import rkd_loss  # isort: skip
from nst_det.losses.dkd import dkd_loss  # isort: skip
from nst_det.losses.dist import dist_loss  # isort: skip
from nst_det.losses.loss import TransferLoss, build_transfer, pair_shapes
from nst_det.losses.loss_balance import TermBalance, gradient_norms
from nst_det.losses.method import LABELS_ONLY, Method, parse_method

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
    "gaussian_nll",
    "generation_loss",
    "get_term",
    "gradient_norms",
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
