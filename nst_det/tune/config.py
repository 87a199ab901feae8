"""What a search is asked to do: its own few keys, and the comparison whose methods it searches for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.compare.config import Comparison, load_comparison
from nst_det.compare.method import parse_row
from nst_det.errors import UserError
from nst_det.runtime.config import expand_path, flat, load_config, plain
from nst_det.tune.space import Space, space_of

TOP1, MAP = "top1", "map"
# these may grow (or differ) between two calls on one folder
GROWING_KEYS = ("OUTPUT_DIR", "METHODS", "TRIALS")


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
