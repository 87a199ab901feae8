"""Weights in pickles: none is opened that could run code, unless the user says that its source is trusted."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nst_det.errors import UserError
from nst_det.runtime.checkpoint import check_intact

log = logging.getLogger(__name__)
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_pickles(trust: bool = True) -> Iterator[None]:
    """Within the block any pickle is opened (TRUST_PICKLE, ``--trust-pickle``); False changes nothing."""
    token = _trusted.set(trust or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def pickles_are_trusted() -> bool:
    """Whether this is within :func:`trusting_pickles`."""
    return _trusted.get()


def load_pickled(path: str | Path) -> Any:
    """What is in a ``.pth``, ``.pt``, ``.pyth`` or ``.pkl`` file, tensors on the CPU.

    Plain tensors, numbers, text and containers of them are read by ``torch.load(weights_only=True)``, which runs
    nothing.  A pickle with anything else in it (Detectron2's ``.pkl`` files have NumPy arrays) is opened only where
    pickles are trusted.

    Raises:
        UserError: no such file, damaged, no weights file at all, or a pickle that isn't trusted.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: weights can't be read ({error.strerror}); correct the path") from error
    zipped, pickled = start[:2] == b"PK", start[:1] == b"\x80"
    if not zipped and not pickled:
        raise UserError(f"{path}: not a weights file (neither torch's nor a pickle); get it again, or correct the path")
    if zipped:
        check_intact(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever it stumbles over
        if not _holds_pickle(path):
            raise UserError(f"{path}: not a weights file of torch ({type(error).__name__}); get it again") from error
        if not _trusted.get():
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise UserError(
                f"{path}: not opened: it is a pickle that holds more than weights{f' ({found[1]})' if found else ''}, "
                "and opening such a file runs whatever code its author put there; take weights as .safetensors, or if "
                "you trust where it is from, add --trust-pickle (in a config: TRUST_PICKLE True)"
            ) from error
    return _open_trusted(path, zipped)


def _holds_pickle(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return True
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())


def _open_trusted(path: Path, zipped: bool) -> Any:
    log.warning("%s: a pickle, opened because TRUST_PICKLE says so", path)
    try:
        if zipped:
            return torch.load(path, map_location="cpu", weights_only=False)
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception:  # not torch's; a plain pickle then, as in Detectron2's model zoo
            with open(path, "rb") as file:
                return pickle.load(file, encoding="latin1")
    except Exception as error:  # a pickle raises whatever its author wants
        raise UserError(f"{path}: damaged, or not a weights file ({type(error).__name__}); get it again") from error


def as_tensors(value: Any) -> Any:
    """NumPy arrays of a mapping as tensors; all else as it is.

    Example:
        >>> as_tensors({"a": np.zeros(2, np.float32)})
        {'a': tensor([0., 0.])}
    """
    if not isinstance(value, Mapping):
        return value
    return {key: torch.from_numpy(item) if isinstance(item, np.ndarray) else item for key, item in value.items()}
