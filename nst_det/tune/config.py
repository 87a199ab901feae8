"""What a search is asked to do: its own few keys, and the comparison whose methods it searches for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.config import Comparison, load_comparison, parse_row
from nst_det.engine.config import expand_path, flat, load_config, plain
from nst_det.errors import UserError
from nst_det.losses import Method
from nst_det.losses.registry import get_term

LEVELS = "levels"
TOP1, MAP = "top1", "map"
# these may grow (or differ) between two calls on one folder
GROWING_KEYS = ("OUTPUT_DIR", "METHODS", "TRIALS")


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


def default_config() -> CfgNode:
    """The keys of a search with their defaults.

    ===================  ===========================================================================================
    COMPARE              the comparison's YAML (relative to this file): methods, data and both stages
    OPTS                 KEY VALUE pairs on top of it, as ``nst-det compare`` takes them
    OUTPUT_DIR           where everything is written; "" takes output/NAME_tune, with the comparison's NAME
    METHODS              words of the methods to search for; [] takes the comparison's
    TRIALS               settings tried for each method; the first is the configured one
    SEEDS                each setting is trained once for each of them
    SEED                 of the search itself
    OBJECTIVE            top1 (of the student) or map (of its detector, 11-point); a method with ``@det`` takes map
    VAL_FRACTION         share of the training images (of each class) that is kept from training and judged on
    VAL_SEED             chooses these images
    WEIGHT               each term's weight is searched from the configured one times WEIGHT[0] to times WEIGHT[1]
    LEVELS               lists of levels to choose from in stage one, beside the configured ones
    DET_LEVELS           the same in stage two
    OPTIONS              term -> option -> values to choose from, beside the configured one
    ===================  ===========================================================================================
    """
    config = CfgNode()
    config.COMPARE = ""
    config.OPTS = []
    config.OUTPUT_DIR = ""
    config.METHODS = []
    config.TRIALS = 8
    config.SEEDS = [0]
    config.SEED = 0
    config.OBJECTIVE = TOP1
    config.VAL_FRACTION = 0.2
    config.VAL_SEED = 0
    config.WEIGHT = [0.1, 10.0]
    config.LEVELS = []
    config.DET_LEVELS = []
    config.OPTIONS = CfgNode(new_allowed=True)
    return config


@dataclass(frozen=True)
class Tuning:
    """A search with everything resolved and checked.

    Attributes:
        folder: where it is written.
        base: the comparison, with the validation split in the place of all test data.
        spaces: what is searched for each method, by its word.
        trials: settings for each method.
        seed: of the sampler.
        objective: ``top1`` or ``map``; see :meth:`objective_of`.
        claim: what must not change between two calls on one folder.
        budget: what each method gets, for the file that is written.
    """

    folder: Path
    base: Comparison
    spaces: dict[str, Space]
    trials: int
    seed: int
    objective: str
    claim: dict[str, Any]
    budget: dict[str, Any]

    def objective_of(self, word: str) -> str:
        """What a method is judged by: terms of stage two show in the detector alone."""
        return MAP if parse_row(word).detector.names else self.objective


def load_tuning(file: str | Path, output: str | Path | None = None, overrides: Sequence[str] = ()) -> Tuning:
    """Read and check a search before anything is started.

    Args:
        file: its YAML.
        output: takes the place of OUTPUT_DIR.
        overrides: KEY VALUE pairs.

    Raises:
        UserError: a key or value here, in the comparison or in a stage's config can't be used.
    """
    config = load_config(default_config(), file, overrides)
    _check(config, str(file))
    compare = Path(expand_path(config.COMPARE, "COMPARE"))
    if "COMPARE" not in overrides[::2]:
        compare = Path(os.path.normpath(Path(file).parent / compare))
    named = str(output or config.OUTPUT_DIR) or f"output/{load_comparison(compare, None, _opts(config)).name}_tune"
    folder = Path(expand_path(named, "OUTPUT_DIR")).resolve()
    base = load_comparison(compare, folder, [*_opts(config), *_validation(config)])
    words = [word for word in base.methods if config.METHODS or parse_row(word).word != "ce"]
    spaces = {word: space_of(word, base, config, str(file)) for word in words if word != "ce"}
    if not spaces:
        raise UserError(f"{file}: METHODS has no method with a term to search for")
    own = {key: value for key, value in plain(flat(config)).items() if key not in GROWING_KEYS}
    budget = {
        "trials": config.TRIALS,
        "seeds": list(base.seeds),
        "objective": config.OBJECTIVE,
        "validation": f"{config.VAL_FRACTION:g} of the training images, chosen by seed {config.VAL_SEED}",
        "steps": {"stage one": base.distill.SOLVER.MAX_ITER, "stage two": base.detect.SOLVER.MAX_ITER},
        "weights": f"configured weight times {config.WEIGHT[0]:g} to {config.WEIGHT[1]:g}",
    }
    return Tuning(
        folder=folder,
        base=base,
        spaces=spaces,
        trials=config.TRIALS,
        seed=config.SEED,
        objective=config.OBJECTIVE,
        claim={**base.claim, **{f"TUNE.{key}": value for key, value in own.items()}},
        budget=budget,
    )


def _opts(config: CfgNode) -> list[str]:
    return [str(word) for word in config.OPTS]


def _validation(config: CfgNode) -> list[str]:
    """What keeps test data out: both stages are judged on a part of their training images, and name no other."""
    share, seed = str(config.VAL_FRACTION), str(config.VAL_SEED)
    words = ["DISTILL.DATA.VAL_FROM", "train", "DISTILL.DATA.VAL_FRACTION", share, "DISTILL.DATA.VAL_SEED", seed]
    words += ["DETECT.DATASETS.VAL_FRACTION", share, "DETECT.DATASETS.VAL_SEED", seed, "DETECT.DATASETS.TEST", "[]"]
    words += ["DETECT.TEST.EVAL_PERIOD", "0", "TUNED", "", "ROWS", "[]", "SEEDS", str(list(config.SEEDS))]
    return words + (["METHODS", str(list(config.METHODS))] if config.METHODS else [])


def _check(config: CfgNode, source: str) -> None:
    def require(fits: bool, key: str, wanted: str) -> None:
        if not fits:
            raise UserError(f"{source}: {key} must be {wanted}, but is {config[key]!r}")

    require(bool(config.COMPARE), "COMPARE", "the YAML of a comparison")
    require(config.TRIALS >= 1, "TRIALS", "at least 1")
    require(config.SEED >= 0, "SEED", "0 or more")
    require(config.OBJECTIVE in (TOP1, MAP), "OBJECTIVE", f"{TOP1} or {MAP}")
    require(0 < config.VAL_FRACTION < 1, "VAL_FRACTION", "a fraction between 0 and 1")
    low, high = config.WEIGHT if len(config.WEIGHT) == 2 else (0, 0)
    require(0 < low <= 1 <= high and low < high, "WEIGHT", "two factors around 1, smallest first, such as [0.1, 10.0]")
    for key in ("LEVELS", "DET_LEVELS"):
        lists = all(isinstance(item, list | tuple) and item for item in config[key])
        require(lists, key, "a list of lists of levels, such as [[res3], [res3, res4]]")
