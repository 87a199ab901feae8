"""Transfer losses: what a teacher hands to a student, as functions on tensors and as the terms of a method."""

from nst_det.transfer.outputs import Outputs
from nst_det.transfer.registry import Pair, Term, get_term, register_term, terms, unregister_term

# isort: split
# each of these registers its terms; their order is the order of a method's canonical word
from nst_det.transfer.kd import kd_loss

from nst_det.transfer.fitnet import hint_loss  # isort: skip
from nst_det.transfer.at import at_loss  # isort: skip
from nst_det.transfer.nst import nst_loss  # isort: skip
from nst_det.transfer.vid import gaussian_nll  # isort: skip
from nst_det.transfer.lp import lp_loss  # isort: skip
from nst_det.transfer.cwd import cwd_loss  # isort: skip
from nst_det.transfer.pkd import pkd_loss  # isort: skip
from nst_det.transfer.mgd import generation_loss  # isort: skip

# isort: split
from nst_det.transfer.balance import TermBalance, gradient_norms
from nst_det.transfer.loss import TransferLoss, build_transfer
from nst_det.transfer.method import LABELS_ONLY, Method, parse_method
from nst_det.transfer.shapes import PairShape, pair_shapes

__all__ = [
    "LABELS_ONLY",
    "Method",
    "Outputs",
    "Pair",
    "PairShape",
    "Term",
    "TermBalance",
    "TransferLoss",
    "at_loss",
    "build_transfer",
    "cwd_loss",
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
    "terms",
    "unregister_term",
]
