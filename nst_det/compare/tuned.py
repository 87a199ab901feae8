"""Weights and levels that ``nst-det tune`` chose, as a comparison takes them, and where each row's weights are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nst_det.compare.method import parse_row
from nst_det.errors import UserError
from nst_det.runtime.config import plain, read_yaml
from nst_det.transfer import Method

# what the file may hold for a method: keys of the TRANSFER node of its stage
SETTINGS = ("LEVELS", "WEIGHTS", "OPTIONS")


@dataclass(frozen=True)
class Tuned:
    """What was found for one method.

    Attributes:
        settings: LEVELS, WEIGHTS and OPTIONS of the TRANSFER node, as far as they were searched.
        trials: how many settings were tried, the default ones included.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0


def read_tuned(path: Path) -> dict[str, Tuned]:
    """The methods of a file of ``nst-det tune``, by their canonical words.

    Raises:
        UserError: it can't be read, or isn't such a file.
    """
    tree = read_yaml(path)
    methods = tree.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise UserError(f"{path}: no methods in it; name the tuned.yaml that nst-det tune wrote")
    found = {}
    for word, entry in methods.items():
        try:
            canonical = parse_row(word).word
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        settings, trials = (
            (entry.get(key) for key in ("settings", "trials")) if isinstance(entry, dict) else (None, None)
        )
        if not isinstance(settings, dict) or not set(settings) <= set(SETTINGS) or not isinstance(trials, int):
            raise UserError(f"{path}: {word} needs trials, and settings with {', '.join(SETTINGS)} alone")
        found[canonical] = Tuned(settings, trials)
    return found


def weights_from(word: str, tuned: Mapping[str, Tuned], distill: Mapping[str, Any], detect: Mapping[str, Any]) -> str:
    """Where the weights of a row are from, in a few words; "" for a row without terms.

    Args:
        word: the row's.
        tuned: by word, as :func:`read_tuned` gives it.
        distill: the TRANSFER node of stage one.
        detect: the TRANSFER node of stage two.
    """
    row = parse_row(word)
    # the backbone of a row with terms of stage two is that of the row without them
    parts = [(row.backbone, row.backbone.word, distill), (row.detector, row.word, detect)]
    sources = [_source(method, tuned.get(key), node) for method, key, node in parts if method.names]
    return ", ".join(dict.fromkeys(sources))


def _source(method: Method, tuned: Tuned | None, node: Mapping[str, Any]) -> str:
    if tuned is not None:
        return f"tuned: {tuned.trials} trials"
    given, automatic = (plain(node.get(key) or {}) for key in ("WEIGHTS", "AUTO_WEIGHT"))
    sources = [
        "weight in the word"
        if weight is not None
        else "automatic weight"
        if name in automatic
        else "configured weight"
        if name in given
        else "default weight"
        for name, weight in method
    ]
    return ", ".join(dict.fromkeys(sources))
