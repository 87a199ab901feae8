"""The validation split of stage two: cut from DATASETS.TRAIN, so that DATASETS.TEST is left for the last word."""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from nst_det.data.holdout import JoinedVoc, hold_out
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError


def split_training(config: CfgNode, sets: Sequence[VocDataset]) -> tuple[list[VocDataset], JoinedVoc | None]:
    """What is left to train on, and what DATASETS.VAL_FRACTION keeps to validate on.

    The same images whatever the engine, the method and the SEED.

    Args:
        config: reads DATASETS.VAL_FRACTION and VAL_SEED.
        sets: the data sets of DATASETS.TRAIN, whole.

    Returns:
        One training set for each of ``sets``, and the validation split of all of them together; None where
        VAL_FRACTION is 0.

    Raises:
        UserError: the fraction is out of range or leaves nothing on one side, or a bad annotation.
    """
    fraction = config.DATASETS.VAL_FRACTION
    if not 0 <= fraction < 1:
        raise UserError(f"DATASETS.VAL_FRACTION is {fraction}; it must be from 0 to below 1")
    if not fraction:
        return list(sets), None
    pairs = [hold_out(data, fraction, config.DATASETS.VAL_SEED) for data in sets]
    return [left for left, _ in pairs], JoinedVoc(tuple(kept for _, kept in pairs))
