"""What is searched for a method: a weight for each term, its levels, and the options that are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.compare.config import Comparison
from nst_det.compare.method import parse_row
from nst_det.errors import UserError
from nst_det.runtime.config import plain
from nst_det.transfer import Method
from nst_det.transfer.registry import get_term

LEVELS = "levels"


@dataclass(frozen=True)
class Space:
    """The settings that a method may get.

    Attributes:
        weights: term to the smallest and largest weight, searched on a logarithmic scale.
        choices: ``levels``, or ``term.option``, to the values to choose from as JSON.
        default: the configured setting, a value for each name in ``weights`` and ``choices``.
    """

    weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a TRANSFER node for values by name.

        Example:
            >>> space = Space({"at": (1.0, 100.0)}, {"levels": ('["res3"]', '["res4"]')})
            >>> space.settings({"at": 3.0, "levels": '["res4"]'})
            {'WEIGHTS': {'at': 3.0}, 'LEVELS': ['res4']}
        """
        node: dict[str, Any] = {"WEIGHTS": {name: values[name] for name in self.weights}}
        options: dict[str, dict[str, Any]] = {}
        for name in self.choices:
            if name == LEVELS:
                node["LEVELS"] = json.loads(values[name])
            else:
                term, _, option = name.partition(".")
                options.setdefault(term, {})[option] = json.loads(values[name])
        return node | ({"OPTIONS": options} if options else {})


def space_of(word: str, base: Comparison, config: CfgNode, source: str) -> Space:
    """The space of a row's method: its terms of stage two where it has some, else those of stage one.

    A weight that stands in the word, or that AUTO_WEIGHT finds, is not searched.

    Args:
        word: the row's.
        base: reads TRANSFER of the stage in question.
        config: reads WEIGHT, LEVELS, DET_LEVELS and OPTIONS of the search.
        source: named in errors.

    Raises:
        UserError: OPTIONS names an option that a term doesn't have, or a weight can't be scaled because it is 0.
    """
    row = parse_row(word)
    method, node, candidates = row.backbone, base.distill.TRANSFER, config.LEVELS
    configured = list(node.LEVELS)
    if row.detector.names:
        method, node, candidates = row.detector, base.detect.TRANSFER, config.DET_LEVELS
        configured = list(node.LEVELS) or list(base.detect.MODEL.ROI_HEADS.IN_FEATURES)
    weights, default = _weights(method, node, config.WEIGHT, f"{source}: {word}")
    choices: dict[str, tuple[str, ...]] = {}
    if candidates and any(get_term(name).level == "maps" for name in method.names):
        choices[LEVELS] = _distinct(configured, *(list(item) for item in candidates))
    for name in method.names:
        known = {**get_term(name).options, **plain(node.OPTIONS).get(name, {})}
        for option, values in plain(config.OPTIONS).get(name, {}).items():
            if option not in known or not isinstance(values, list):
                has = ", ".join(known) or "none"
                raise UserError(f"{source}: OPTIONS.{name}.{option} must be a list for one of its options: {has}")
            choices[f"{name}.{option}"] = _distinct(known[option], *values)
    return Space(weights, choices, default | {name: values[0] for name, values in choices.items()})


def _weights(
    method: Method, node: CfgNode, factors: list[float], where: str
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    ranges, default = {}, {}
    for name, weight in method:
        if weight is None and name not in node.AUTO_WEIGHT:
            start = float(node.WEIGHTS.get(name, get_term(name).weight))
            if start <= 0:
                raise UserError(
                    f"{where}: the weight of {name} is {start:g}, which no factor changes; give another one"
                )
            ranges[name], default[name] = (start * factors[0], start * factors[1]), start
    return ranges, default


def _distinct(*values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(json.dumps(value) for value in values))
