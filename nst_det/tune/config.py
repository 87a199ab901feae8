"""What a search is asked to do: its own few keys, and the comparison whose methods it searches for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.config import Comparison, load_comparison, path_beside, require
from nst_det.comparison.plan import finished_teacher, makes_teacher
from nst_det.comparison.result import BASELINE
from nst_det.comparison.stages import DETECT, DISTILL, TITLES, errors_of
from nst_det.distillation.config import transfer_of
from nst_det.engine.config import config_file, expand_path, flat, load_config, plain
from nst_det.engine.fingerprint import RESUME, concerns
from nst_det.engine.keys import Key, at_least, config_tree, one_of
from nst_det.errors import UserError
from nst_det.losses.registry import get_term

LEVELS = "levels"
TOP1, MAP = "top1", "map"


@dataclass(frozen=True)
class Space:
    """The settings that a method may get."""

    # term -> smallest and largest weight, searched on a logarithmic scale
    weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    # "levels" or "term.option" -> values to choose from, as JSON
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # the configured setting: a value for each of these names
    default: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a TRANSFER node for values by name."""
        node: dict[str, Any] = {"WEIGHTS": {name: values[name] for name in self.weights}}
        for name in self.choices:
            if name == LEVELS:
                node["LEVELS"] = json.loads(values[name])
            else:
                term, _, option = name.partition(".")
                node.setdefault("OPTIONS", {}).setdefault(term, {})[option] = json.loads(values[name])
        return node


def space_of(word: str, base: Comparison, config: CfgNode, source: str) -> Space:
    """Return the space of a row's method: of its terms of stage two where it has some, else of those of stage one.

    A weight that is in the method string, or that AUTO_WEIGHT finds, is not searched.
    """
    row = base.methods[word]
    method, node, candidates = row.backbone, transfer_of(base.distill, row.backbone.word), config.LEVELS
    configured = list(node.LEVELS)
    if row.detector.names:
        method, node, candidates = row.detector, base.detect.TRANSFER, config.DET_LEVELS
        configured = list(node.LEVELS) or list(base.detect.MODEL.ROI_HEADS.IN_FEATURES)
    weights: dict[str, tuple[float, float]] = {}
    default: dict[str, Any] = {}
    for name, weight in method:
        if weight is None and name not in node.AUTO_WEIGHT:
            start = float(node.WEIGHTS.get(name, get_term(name).weight))
            if start <= 0:
                raise UserError(
                    f"{source}: {word}: the weight of {name} is {start:g}, which no factor changes; give another one"
                )
            weights[name], default[name] = (start * config.WEIGHT[0], start * config.WEIGHT[1]), start
    # the configured value first
    choices: dict[str, list[Any]] = {}
    if candidates and any(get_term(name).level == "maps" for name in method.names):
        choices[LEVELS] = [configured, *map(list, candidates)]
    for name in method.names:
        known = {**get_term(name).options, **plain(node.OPTIONS).get(name, {})}
        for option, values in plain(config.OPTIONS).get(name, {}).items():
            if option not in known or not isinstance(values, list):
                has = ", ".join(known) or "none"
                raise UserError(f"{source}: OPTIONS.{name}.{option} must be a list for one of its options: {has}")
            choices[f"{name}.{option}"] = [known[option], *values]
    distinct = {name: tuple(dict.fromkeys(map(json.dumps, values))) for name, values in choices.items()}
    return Space(weights, distinct, default | {name: values[0] for name, values in distinct.items()})


KEYS = {
    "COMPARE": Key("", "the comparison's YAML, relative to this file: methods, data and both stages"),
    "OPTS": Key([], "KEY VALUE pairs on top of it, as nst-det compare takes them"),
    "OUTPUT_DIR": Key("", 'where everything is written; "" takes output/NAME_tune, with the comparison\'s NAME'),
    "METHODS": Key([], "methods to search for; [] takes the comparison's"),
    "TRIALS": at_least("settings tried for each method; the first is the configured one", 1, 8),
    "SEEDS": Key([0], "each setting is trained once for each of them"),
    "SEED": at_least("of the search itself", 0, 0),
    "OBJECTIVE": one_of(
        "top1 of the student (without labels what TEST.PROBE, or the teacher, judges it by), or map of its detector "
        "(11-point), which a method with @det takes",
        TOP1,
        MAP,
    ),
    "VAL_FRACTION": Key(0.2, "share of the training images (of each class) that is kept from training and judged on"),
    "VAL_SEED": Key(0, "chooses these images"),
    "WEIGHT": Key([0.1, 10.0], "each term's weight is searched from WEIGHT[0] to WEIGHT[1] times the configured one"),
    "LEVELS": Key([], "lists of levels to choose from in stage one, beside the configured ones"),
    "DET_LEVELS": Key([], "the same of stage two"),
    "OPTIONS": Key({}, "term -> option -> values to choose from, beside the configured one"),
}


@dataclass(frozen=True)
class Tuning:
    """A search with everything resolved and checked."""

    folder: Path
    base: Comparison  # with the validation split in the place of all test data
    spaces: dict[str, Space]  # by method string
    trials: int  # settings for each method
    seed: int  # of the sampler
    objective: str  # TOP1 or MAP, see objective_of
    claim: dict[str, Any]  # what must not change between two calls on one folder
    budget: dict[str, Any]  # what each method gets, for the file that is written

    def learns_in_stage_two(self, word: str) -> bool:
        return bool(self.base.methods[word].detector.names)

    def objective_of(self, word: str) -> str:
        """Return what a method is judged by: terms of stage two show in the detector alone."""
        return MAP if self.learns_in_stage_two(word) else self.objective


def _check_images(comparison: Comparison, search: Comparison, file: str, compare: str) -> None:
    """Refuse a search of which too few images are left to train on, or that sees those its comparison is judged on."""
    if search.generate or not Path(expand_path(search.distill.DATA.ROOT, "DATA.ROOT")).exists():
        # it is made, or named, before the first run
        return
    # torch takes seconds to import
    from nst_det.distillation.dataloader import read_data

    if search.distill.DATA.PER_CLASS:
        # what is wrong without a search is told as it is there
        read_data(comparison.distill)
        with errors_of(f"{file}: VAL_FRACTION (DATA.VAL_FRACTION of stage one)"):
            read_data(search.distill)
    if search.detect:
        return
    whole = search.distill.clone()
    whole.defrost()
    whole.DATA.VAL_FRACTION = 0.0
    judged, seen = (read_data(one, whole=True) for one in (comparison.distill, whole))
    if not {*judged.val.paths}.isdisjoint(seen.train.paths):
        raise UserError(
            f"{compare}: DISTILL.DATA.ROOT {comparison.distill.DATA.ROOT} has no val folder: the search would see the "
            "images on which the comparison judges its rows; put some images of each class into val/CLASS"
        )


def load_tuning(file: str | Path, output: str | Path | None = None, overrides: Sequence[str] = ()) -> Tuning:
    """Read and check a search; ``output`` replaces OUTPUT_DIR, ``overrides`` are KEY VALUE pairs."""
    file = config_file(file, "tune.yaml")
    config = load_config(config_tree(KEYS), file, overrides)
    low, high = config.WEIGHT if len(config.WEIGHT) == 2 else (0, 0)
    around_one = "two factors around 1, smallest first, such as [0.1, 10.0]"
    fits: dict[str, tuple[object, str]] = {
        **{name: (key.takes(config[name]), key.wanted) for name, key in KEYS.items() if key.wanted},
        "VAL_FRACTION": (0 < config.VAL_FRACTION < 1, "a fraction between 0 and 1"),
        "WEIGHT": (0 < low <= 1 <= high and low < high, around_one),
    }
    for key in ("LEVELS", "DET_LEVELS"):
        good = all(isinstance(item, list | tuple) and item for item in config[key])
        fits[key] = (good, "a list of lists of levels, such as [[res3], [res3, res4]]")
    require(config, fits, str(file))
    with errors_of(f"{file}: OPTIONS", ValueError):
        for term in config.OPTIONS:
            get_term(term)
    compare = path_beside(config.COMPARE, "COMPARE", file, overrides)
    opts = [str(word) for word in config.OPTS]
    comparison = load_comparison(compare, None, opts)
    if config.OBJECTIVE == MAP and not comparison.detect:
        raise UserError(f"{file}: OBJECTIVE {MAP} is that of a detector, and {compare} has none; take {TOP1}")
    named = str(output or config.OUTPUT_DIR) or f"output/{comparison.name}_tune"
    folder = Path(expand_path(named, "OUTPUT_DIR")).resolve()
    # a search that has begun to train its own keeps it
    teacher = "" if (folder / "teacher").exists() else finished_teacher(comparison)
    # test data stays out: both stages are judged on a part of their training images, and name no other
    of_detectors = {
        "DETECT.DATASETS.VAL": [],
        "DETECT.DATASETS.VAL_FRACTION": config.VAL_FRACTION,
        "DETECT.DATASETS.VAL_SEED": config.VAL_SEED,
        "DETECT.DATASETS.TEST": [],
        # the last weights are judged
        "DETECT.TEST.EVAL_PERIOD": 0,
        "DETECT.TEST.SELECT": "last",
        "DETECT.TEST.PATIENCE": 0,
    }
    settings = {
        "DISTILL.DATA.VAL_FROM": "train",
        "DISTILL.DATA.VAL_FRACTION": config.VAL_FRACTION,
        "DISTILL.DATA.VAL_SEED": config.VAL_SEED,
        # of other images, and perhaps of fewer levels
        "DISTILL.CACHE.DIR": "",
        "DISTILL.CACHE.DTYPE": "auto",
        **(of_detectors if comparison.detect else {}),
        "TUNED": "",
        "ROWS": [],
        "SEEDS": list(config.SEEDS),
        **({"METHODS": list(config.METHODS)} if config.METHODS else {}),
        **({"DISTILL.TEACHER.WEIGHTS": teacher} if teacher else {}),
    }
    base = load_comparison(compare, folder, [*opts, *(str(word) for pair in settings.items() for word in pair)])
    _check_images(comparison, base, str(file), str(compare))
    spaces = {word: space_of(word, base, config, str(file)) for word in base.methods if word != BASELINE}
    if not spaces:
        raise UserError(f"{file}: METHODS has no method with a term to search for")
    for word, space in spaces.items():
        if not space.default:
            raise UserError(
                f"{file}: METHODS {word}: there is nothing to search, as its weights are given; leave it out, or add "
                "LEVELS or OPTIONS"
            )
    own = {key: value for key, value in plain(flat(config)).items() if concerns(key, RESUME)}
    stages = {DISTILL: base.distill, DETECT: base.detect}
    budget = {
        "trials": config.TRIALS,
        "seeds": list(base.seeds),
        "objective": config.OBJECTIVE,
        "validation": f"{config.VAL_FRACTION:g} of the training images, chosen by seed {config.VAL_SEED}",
        "steps": {TITLES[stage]: one.SOLVER.MAX_ITER for stage, one in stages.items() if one},
        # which has seen the images that students are judged on
        "teacher": "the comparison's" if teacher else "trained here" if makes_teacher(base) else "given",
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
