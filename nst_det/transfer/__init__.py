"""Transfer losses: what a teacher hands to a student, as functions on tensors and as the terms of a method."""

from nst_det.transfer.outputs import Outputs
from nst_det.transfer.registry import Pair, Term, get_term, register_term, terms, unregister_term

# isort: split
# each of these registers its terms; their order is the order of a method's canonical word
from nst_det.transfer.kd import kd_loss

from nst_det.transfer.fitnet import hint_loss  # isort: skip
from nst_det.transfer.at import at_loss  # isort: skip
from nst_det.transfer.nst import nst_loss  # isort: skip

# isort: split
from nst_det.transfer.loss import TransferLoss, build_transfer
from nst_det.transfer.method import LABELS_ONLY, Method, parse_method

__all__ = [
    "LABELS_ONLY",
    "Method",
    "Outputs",
    "Pair",
    "Term",
    "TransferLoss",
    "at_loss",
    "build_transfer",
    "get_term",
    "hint_loss",
    "kd_loss",
    "nst_loss",
    "parse_method",
    "register_term",
    "terms",
    "unregister_term",
]
