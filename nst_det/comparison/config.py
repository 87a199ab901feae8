"""What a comparison is asked to do: its own few keys, and the two stages' configs that it hands on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.published import OF_DETECTORS, PUBLISHED
from nst_det.comparison.result import (
    BASELINE,
    COCO,
    IMAGENET,
    MAP,
    MEASURES,
    NO_FPN,
    PUBLISHED_STARTS,
    SCRATCH,
    TEACHER,
    TOP1,
    Measure,
    TermWeight,
)
from nst_det.comparison.rows import (
    ROW_OPTS,
    TEACHER_NETWORK,
    published_detector,
    published_weights,
    teacher_pixels,
    without_fpn,
)
from nst_det.comparison.stages import (
    DETECT,
    DISTILL,
    check_generated,
    check_stages_fit,
    data_fingerprints,
    errors_of,
    load_stage,
    merge_stage,
    weight_fingerprints,
)
from nst_det.detection.augment import change_preset
from nst_det.detection.config import ENGINES, choose_engine, wanted_engine
from nst_det.distillation.config import AGREEMENT, CKA
from nst_det.engine.config import (
    config_file,
    expand_path,
    flat,
    key_values,
    load_config,
    merge_overrides,
    plain,
    read_yaml,
)
from nst_det.engine.fingerprint import RESUME, RUN, concerns
from nst_det.engine.io import read_json
from nst_det.engine.keys import Key, config_tree, one_of
from nst_det.engine.machine import core_count
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import LABELS_ONLY, Method, parse_method
from nst_det.losses.registry import get_term
from nst_det.models.registry import check_name

MARK = "@det"
TERM = re.compile(r"\s*([^@:\s]+)\s*(@det)?\s*(:[^@]*)?")
# keys of a stage's TRANSFER node that a search may set
SETTINGS = ("LEVELS", "WEIGHTS", "OPTIONS")
# small networks gain nothing from more
MOST_THREADS = 8


@dataclass(frozen=True)
class RowSpec:
    """The methods of a row in both stages; either may be ``ce``."""

    backbone: Method
    detector: Method  # without the marks

    @property
    def word(self) -> str:
        """The canonical method string."""
        parted = [term.partition(":") for term in self.detector.word.split("+") if self.detector.names]
        marked = [name + MARK + colon + weight for name, colon, weight in parted]
        return "+".join([*([self.backbone.word] if self.backbone.names or not marked else []), *marked])


def parse_row(word: str) -> RowSpec:
    """Return a row's methods from its method string, such as ``nst-poly+cwd@det:5``; ValueError where it is none."""
    terms: dict[str, list[str]] = {"": [], MARK: []}
    for term in str(word).strip().lower().split("+"):
        match = TERM.fullmatch(term)
        if not match:
            raise ValueError(f"method '{word}': write a term as name, name:weight, name{MARK} or name{MARK}:weight")
        name, mark, weight = match.groups("")
        terms[mark].append(name + weight)
    row = RowSpec(*(parse_method("+".join(own) or LABELS_ONLY) for own in terms.values()))
    if terms[MARK] and not row.detector.names:
        raise ValueError(f"method '{word}': ce (labels only) learns from no teacher; leave out {MARK}")
    return row


@dataclass(frozen=True)
class Tuned:
    """What a search found for one method: keys of its TRANSFER node, and the trials that it took."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0


def read_tuned(path: Path) -> dict[str, Tuned]:
    """Return the methods of a file of ``nst-det tune``, by method string."""
    methods = read_yaml(path).get("methods")
    if not isinstance(methods, dict) or not methods:
        raise UserError(f"{path}: no methods in it; name the tuned.yaml that nst-det tune wrote")
    found = {}
    for word, entry in methods.items():
        with errors_of(str(path), ValueError):
            canonical = parse_row(word).word
        settings, trials = (entry.get(key) if isinstance(entry, dict) else None for key in ("settings", "trials"))
        if not isinstance(settings, dict) or not set(settings) <= set(SETTINGS) or not isinstance(trials, int):
            raise UserError(f"{path}: {word} needs trials, and settings with {', '.join(SETTINGS)} alone")
        found[canonical] = Tuned(settings, trials)
    return found


def row_weights(
    row: RowSpec,
    tuned: Mapping[str, Tuned],
    nodes: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, float]] = ({}, {}),
) -> list[TermWeight]:
    """Return the weight of each term and where it is from.

    ``nodes`` are the TRANSFER nodes of both stages, ``found`` the weights that training had there.
    """
    weights = []
    # the backbone of a row with terms of stage two is that of the row without them
    parts = [(row.backbone, row.backbone.word, ""), (row.detector, row.word, MARK)]
    for (method, word, mark), node, trained in zip(parts, nodes, found):
        search = tuned.get(word, Tuned())
        for name, weight in method:
            default = get_term(name).weight
            source: Any = "default"
            if weight is None and name in node.get("AUTO_WEIGHT", {}):
                source = "auto"
            elif weight is None and name in search.settings.get("WEIGHTS", {}):
                source = "tuned"
            elif weight is not None or node.get("WEIGHTS", {}).get(name, default) != default:
                source = "configured"
            weights.append(
                TermWeight(name + mark, trained.get(name), source, search.trials if source == "tuned" else None)
            )
    return weights


KEYS = {
    "NAME": Key("comparison", "begins the names of the backbone files"),
    "OUTPUT_DIR": Key("", 'where everything is written; "" takes output/NAME'),
    "ENGINE": one_of(
        "engine of the detectors; auto takes DETECT.CONFIG's, and where that is auto, too, Detectron2 if installed",
        *ENGINES,
    ),
    "METHODS": Key(
        ["kd", "nst-poly"],
        "transfer methods beside ce (labels only); a term marked @det works in stage two, from a teacher detector "
        "(cwd@det, kd+nst-poly@det)",
    ),
    "SEEDS": Key([0], "one whole set of rows a seed"),
    "ROWS": Key(
        [],
        "more detectors: scratch (random backbone, always among them), imagenet (published weights "
        "of the student's architecture, without stage one), coco (begins with a detector of COCO, perhaps of another "
        "architecture), no-fpn (as ce, without FPN: the difference is "
        "what FPN brings), teacher (the teacher's backbone, an upper mark)",
    ),
    "PUBLISHED": Key(
        [],
        "tables of papers that the report puts beside its own: " + ", ".join(PUBLISHED) + f"; [] takes {OF_DETECTORS}, "
        "and none where stage one alone is compared",
    ),
    "TUNED": Key("", 'the tuned.yaml of nst-det tune: weights and levels of the methods in it; "" takes none'),
    "JOBS": Key(
        0,
        "runs side by side; 0 means one per GPU, or without a GPU one per core; runs on GPUs share the cores, and runs "
        "on the CPU beside them do not count",
    ),
    "THREADS": Key(0, "CPU threads of stage one (a detector has one); 0 takes the cores, at most 8"),
    "DATA.GENERATE": Key({}, "settings of the generated data set; {} generates none"),
    "DATA.ROOT": Key("", 'where it is written; "" takes OUTPUT_DIR/data'),
    "DISTILL.CONFIG": Key("", "stage one's YAML, relative to this file"),
    "DISTILL.OPTS": Key([], "KEY VALUE pairs on top of it"),
    "DETECT.CONFIG": Key(
        "", 'stage two\'s YAML, relative to this file; "" compares stage one alone: its students, by top-1'
    ),
    "DETECT.OPTS": Key([], "KEY VALUE pairs on top of it"),
    "DETECT.SCRATCH_OPTS": Key([], "KEY VALUE pairs for the row scratch alone"),
    "DETECT.IMAGENET_OPTS": Key(
        [],
        "KEY VALUE pairs for the row imagenet; its weights are those that students begin with "
        "(DISTILL.STUDENT.WEIGHTS or PRETRAINED), or the MODEL.WEIGHTS here",
    ),
    "DETECT.COCO_OPTS": Key(
        [],
        "KEY VALUE pairs for the row coco; MODEL.WEIGHTS among them names a detector's file, and of torchvision's and "
        "Detectron2's the detector's other keys are read off it",
    ),
    "DETECT.NO_FPN_OPTS": Key([], "KEY VALUE pairs for the row no-fpn alone"),
    "DETECT.TEACHER_OPTS": Key(
        [],
        "KEY VALUE pairs for the row teacher, and for the detector that teaches rows with @det (trained "
        "once, with seed "
        "0, unless stage two's config names one by TEACHER)",
    ),
}


@dataclass(frozen=True)
class Comparison:
    """A comparison with everything resolved and checked."""

    name: str
    folder: Path
    engine: str  # "" without detectors
    methods: Mapping[str, RowSpec]  # by method string, ce first, which images without labels don't have
    seeds: tuple[int, ...]
    rows: tuple[str, ...]  # those of ROWS, scratch first; without detectors none, without labels the students' start
    published: tuple[str, ...]
    jobs: int
    threads: int
    generate: dict[str, Any]
    data_root: Path | None  # of the generated data set; None without one
    distill: CfgNode  # the stages' whole configs, before the settings of a single run
    detect: CfgNode  # empty where stage one alone is compared
    row_opts: dict[str, tuple[str, ...]]  # KEY VALUE pairs that a row of ROWS adds in stage two
    another: dict[str, tuple[str, ...]]  # rows about another detector -> the keys that make it
    tuned: Mapping[str, Tuned]  # what a search found, by method string
    claim: dict[str, Any]  # what must not change between two calls on one folder

    @property
    def measure(self) -> Measure:
        """By what the rows are judged."""
        if self.detect:
            return MAP
        if self.distill.DATA.LABELS:
            return TOP1
        if self.distill.TEST.PROBE.ROOT:
            return MEASURES[self.distill.TEST.PROBE.BY]
        # students without a head have no class to agree on
        kinds = [{get_term(name).student_kind for name in row.backbone.names} for row in self.methods.values()]
        return MEASURES[AGREEMENT if all("logits" in one for one in kinds) else CKA]

    @property
    def baseline(self) -> str:
        """The row that all others are compared with."""
        return BASELINE if BASELINE in self.methods else self.rows[0]

    def inputs(self) -> dict[str, str]:
        """Return the fingerprints of data and weights, by key; of generated data its settings in the claim say all."""
        return weight_fingerprints(self.distill) if self.generate else data_fingerprints(self.distill, self.detect)

    @property
    def students(self) -> tuple[str, ...]:
        """The methods of stage one, each once, ``ce`` first."""
        return tuple(dict.fromkeys(row.backbone.word for row in self.methods.values()))

    @property
    def all_rows(self) -> tuple[str, ...]:
        """Rows in the table's order: scratch, imagenet and coco, the methods (those of stage two last), the rest."""
        methods = sorted(self.methods, key=lambda word: bool(self.methods[word].detector.names))
        first = tuple(row for row in self.rows if row in (SCRATCH, *PUBLISHED_STARTS))
        return (*first, *methods, *(row for row in self.rows if row not in first))


def load_comparison(file: str | Path, output: str | Path | None = None, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a comparison; ``output`` replaces OUTPUT_DIR.

    ``overrides`` are KEY VALUE pairs; ``DISTILL.X.Y 3`` and ``DETECT.X.Y 3`` set X.Y of that stage's own config.
    """
    file = config_file(file, "compare.yaml")
    pairs, known = key_values(overrides), KEYS
    # for a stage's own config
    forwarded = [pair for pair in pairs if pair[0] not in known and pair[0].startswith((f"{DISTILL}.", f"{DETECT}."))]
    own = [word for pair in pairs if pair not in forwarded for word in pair]
    config = load_config(config_tree(KEYS), file, own)
    with errors_of(f"{file}: NAME"):
        check_name(config.NAME)
    with errors_of(f"{file}: METHODS", ValueError):
        specs = [parse_row(word) for word in (BASELINE, *config.METHODS)]
    methods, seeds = {row.word: row for row in specs}, config.SEEDS
    numbers = seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    fits = {
        "JOBS": (config.JOBS >= 0, "0 or more"),
        "THREADS": (config.THREADS >= 0, "0 or more"),
        "METHODS": (len({row.word for row in specs[1:]}) == len(specs) - 1, "a list without anything twice"),
        "SEEDS": (numbers and len(set(seeds)) == len(seeds), "a list of different whole numbers, like [0, 1, 2]"),
        "ROWS": (all(row in list(ROW_OPTS) for row in config.ROWS), f"a list of {', '.join(ROW_OPTS)}"),
    }
    require(config, fits, str(file))
    detects = bool(config.DETECT.CONFIG)
    if not detects:
        check_no_detector(config, methods, forwarded, str(file))
    check_keys_of_runs(config, forwarded, str(file))
    rows = tuple(row for row in ROW_OPTS if detects and (row == SCRATCH or row in config.ROWS))
    folder = Path(expand_path(str(output or config.OUTPUT_DIR or f"output/{config.NAME}"), "OUTPUT_DIR")).resolve()
    stages = [DISTILL, DETECT] if detects else [DISTILL]
    files = {stage: path_beside(config[stage].CONFIG, f"{stage}.CONFIG", file, own) for stage in stages}
    engine = ""
    if detects:
        auto = config.ENGINE == "auto"
        wanted, source = (wanted_engine(files[DETECT], ()), files[DETECT]) if auto else (config.ENGINE, file)
        engine = choose_engine(wanted, str(source))
    configs = {stage: _stage_config(stage, files[stage], engine, config, forwarded, file) for stage in stages}
    distill, detect = configs[DISTILL], configs.get(DETECT, CfgNode())
    measure = MAP if detects else TOP1
    known_tables = [name for name, table in PUBLISHED.items() if table.measure is measure and distill.DATA.LABELS]
    if not all(name in known_tables for name in config.PUBLISHED):
        tables = f"of tables with {measure.name}: {', '.join(known_tables)}" if known_tables else "without any"
        raise UserError(f"{file}: PUBLISHED must be a list {tables}")
    if not distill.DATA.LABELS:
        methods = methods_without_labels(specs[1:], rows, str(file))
    if detects:
        check_stages_fit(distill, detect, str(file))
    if detects and detect.METHOD != BASELINE and any(row.detector.names for row in methods.values()):
        raise UserError(
            f"{file}: DETECT.METHOD {detect.METHOD} is for every row, so rows with @det can't have their own; set it "
            "to ce"
        )
    row_opts = {row: tuple(map(str, config.DETECT[key])) for row, key in ROW_OPTS.items()}
    if IMAGENET in rows:
        row_opts[IMAGENET] = (*published_weights(distill, row_opts[IMAGENET], str(file)), *row_opts[IMAGENET])
    row_opts[TEACHER] = (*teacher_pixels(distill), *row_opts[TEACHER])
    another = {COCO: published_detector(detect, row_opts[COCO], str(file)) if COCO in rows else ()}
    another[NO_FPN] = without_fpn(detect) if NO_FPN in rows else ()
    for row, words in another.items():
        another[row] = tuple(key for key in words[::2] if key not in row_opts[row][::2])
        row_opts[row] = (*words, *row_opts[row])
    for row, words in row_opts.items() if detects else ():
        device = merge_stage(detect, words, f"{file}: DETECT.{ROW_OPTS[row]}").MODEL.DEVICE
        if re.fullmatch(r"cuda:[1-9]\d*", device):
            raise UserError(
                f"{file}: DETECT.MODEL.DEVICE {device}: each run of a comparison sees one GPU; set it to cuda, and "
                "choose among several by the environment variable CUDA_VISIBLE_DEVICES"
            )
    if not detects and not distill.DATA.LABELS:
        # measured before stage one, not made by a run
        rows = (IMAGENET if distill.STUDENT.WEIGHTS or distill.STUDENT.PRETRAINED else SCRATCH,)
    generate, data_root = plain(config.DATA.GENERATE), None
    if generate:
        root = expand_path(config.DATA.ROOT, "DATA.ROOT")
        data_root = Path(root).resolve() if root else folder / "data"
        check_generated(generate, data_root, str(file))
    # those of an earlier call on this folder: sums over threads must not change their order
    before = RunFolder(folder).config_path
    recorded = read_json(before).get("THREADS") if before.exists() else None
    threads = config.THREADS or recorded or min(core_count(), MOST_THREADS)
    claim: dict[str, Any] = {}
    for prefix, node in (("", config), (f"{DISTILL}.", distill), (f"{DETECT}.", detect)):
        values = plain(flat(node)).items()
        claim |= {prefix + key: value for key, value in values if concerns(key, RESUME) and not concerns(key, RUN)}
    return Comparison(
        name=config.NAME,
        folder=folder,
        engine=engine,
        methods=methods,
        seeds=tuple(sorted(seeds)),
        rows=rows,
        published=tuple(config.PUBLISHED) or ((OF_DETECTORS,) if detects else ()),
        jobs=config.JOBS,
        threads=threads,
        generate=generate,
        data_root=data_root,
        distill=distill,
        detect=detect,
        row_opts=row_opts,
        another=another,
        tuned=read_tuned(path_beside(config.TUNED, "TUNED", file, own)) if config.TUNED else {},
        claim=claim | {"NAME": config.NAME, "ENGINE": engine, "THREADS": threads},
    )


def check_keys_of_runs(config: CfgNode, forwarded: Sequence[tuple[str, str]], source: str) -> None:
    """Refuse keys of a stage that would be taken and ignored, because a comparison sets them for each run."""
    given = [("command line", key, key.partition(".")[2], "") for key, _ in forwarded]
    lists = [(DISTILL, "OPTS", ""), (DETECT, "OPTS", ""), *((DETECT, key, row) for row, key in ROW_OPTS.items())]
    for stage, name, row in lists:
        given += [(f"{source}: {stage}.{name}", key, key, row) for key in map(str, config[stage][name][::2])]
    for where, key, name, row in given:
        if config.DATA.GENERATE and re.fullmatch(r"DATA\.ROOT|DATASETS\.VOC\..+\.ROOT", name):
            remedy = ", or set DATA.GENERATE '{}'"
        elif row == TEACHER and (taken := [own for own in TEACHER_NETWORK if f"{name}.".startswith(f"{own}.")]):
            remedy = f", or set {DISTILL}.TEACHER.{TEACHER_NETWORK[taken[0]]}"
        elif name == "MODEL.WEIGHTS" and row:
            # the file that such a row begins with
            if row in PUBLISHED_STARTS:
                continue
            remedy = f", or set {DISTILL}.TEACHER.WEIGHTS" if row == TEACHER else ""
        elif concerns(name, RUN):
            remedy = ", or set the comparison's own NAME, METHODS, SEEDS, ENGINE or OUTPUT_DIR"
        else:
            continue
        raise UserError(f"{where}: {key}: a comparison sets it for each run; leave it out{remedy}")


def methods_without_labels(methods: Sequence[RowSpec], rows: Sequence[str], source: str) -> dict[str, RowSpec]:
    """Return METHODS by method string; refuse rows whose student is that of ce, which nothing can learn."""
    found = [f"METHODS {row.word}" for row in methods if not row.backbone.names]
    found += [f"ROWS {NO_FPN}"] * (NO_FPN in rows)
    if found:
        raise UserError(
            f"{source}: {found[0]} has the student of ce (labels only), and DISTILL.DATA.LABELS is False; leave it "
            "out, or add a term of stage one"
        )
    if not methods:
        raise UserError(f"{source}: METHODS is empty, and without labels there is no other student; name methods")
    return {row.word: row for row in methods}


def check_no_detector(
    config: CfgNode, methods: Mapping[str, RowSpec], forwarded: Sequence[tuple[str, str]], source: str
) -> None:
    """Refuse what only a comparison with detectors can have."""
    values = plain(flat(config))
    detectors = [key for key in KEYS if key in ("ENGINE", "ROWS") or key.startswith(f"{DETECT}.")]
    found = [key for key in detectors if values[key] != KEYS[key].default]
    # --trust-pickle is for both stages, whichever there are
    found += [key for key, _ in forwarded if key.startswith(f"{DETECT}.") and key != f"{DETECT}.TRUST_PICKLE"]
    found += [f"METHODS {word}" for word, row in methods.items() if row.detector.names]
    if found:
        raise UserError(
            f"{source}: {found[0]} is for detectors, and DETECT.CONFIG is empty, which compares stage one alone; leave "
            "it out, or give stage two's YAML"
        )


def path_beside(name: str, key: str, file: str | Path, overrides: Sequence[str]) -> Path:
    """Return the path that ``key`` names: relative to ``file``, or as it is where it is from the command line."""
    if not name:
        raise UserError(f"{file}: {key} names no file; give the YAML")
    path = Path(expand_path(name, key))
    return path if key in overrides[::2] else Path(os.path.normpath(Path(file).parent / path))


def _stage_config(
    stage: str, path: Path, engine: str, config: CfgNode, overrides: Sequence[tuple[str, str]], file: str | Path
) -> CfgNode:
    # in a tree of its own, so that an error names the key as it was typed
    typed = CfgNode()
    opts = [str(word) for word in config[stage].OPTS]
    typed[stage] = merge_stage(load_stage(stage, path, engine), opts, f"{file}: {stage}.OPTS")
    typed.defrost()
    own = [pair for pair in overrides if pair[0].startswith(f"{stage}.")]
    change_preset(typed[stage], [(key.partition(".")[2], value) for key, value in own])
    merge_overrides(typed, [word for pair in own for word in pair])
    typed.freeze()
    return typed[stage]


def require(config: CfgNode, fits: Mapping[str, tuple[object, str]], source: str) -> None:
    """Refuse the first key whose value doesn't fit; ``fits`` has whether it does, and what is wanted, by key."""
    for key, (good, wanted) in fits.items():
        if not good:
            raise UserError(f"{source}: {key} must be {wanted}, but is {config[key]!r}")
