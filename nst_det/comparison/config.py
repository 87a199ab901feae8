"""What a comparison is asked to do: its own few keys, and the two stages' configs that it hands on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.stages import (
    DETECT,
    DISTILL,
    STAGES,
    Stage,
    check_generated,
    check_hand_over,
    errors_of,
    resolve_engine,
)
from nst_det.engine.config import expand_path, flat, key_values, load_config, merge_overrides, plain, read_yaml
from nst_det.engine.device import core_count
from nst_det.engine.fingerprint import RESUME, concerns
from nst_det.engine.io import read_json
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import LABELS_ONLY, Method, parse_method
from nst_det.models.registry import check_name

MARK = "@det"
# what the file may hold for a method: keys of the TRANSFER node of its stage
SETTINGS = ("LEVELS", "WEIGHTS", "OPTIONS")
SCRATCH, TEACHER, BASELINE, NO_FPN = "scratch", "teacher", "ce", "no-fpn"
EXTRA_ROWS = (SCRATCH, NO_FPN, TEACHER)
# small networks gain nothing from more
MOST_THREADS = 8
# these may grow (or differ) between two calls on one folder: what is there already stays as it is
GROWING_KEYS = ("OUTPUT_DIR", "METHODS", "SEEDS", "ROWS", "TUNED", "JOBS", "DISTILL", "DETECT")


@dataclass(frozen=True)
class RowSpec:
    """The methods of a row in both stages; ``detector`` is written without its marks, and either may be ``ce``."""

    backbone: Method
    detector: Method

    @property
    def word(self) -> str:
        """The canonical method string: two rows are equal exactly if theirs are."""
        parted = [term.partition(":") for term in self.detector.word.split("+") if self.detector.names]
        marked = [name + MARK + colon + weight for name, colon, weight in parted]
        return "+".join([*([self.backbone.word] if self.backbone.names or not marked else []), *marked])


def parse_row(word: str) -> RowSpec:
    """Return a row's methods from its method string, in which terms of stage two are marked ``@det``.

    Raises:
        ValueError: a string that isn't one, see :func:`nst_det.losses.parse_method`.

    Example:
        >>> row = parse_row("cwd@det:5+nst-poly")
        >>> row.word, row.backbone.word, row.detector.word
        ('nst-poly+cwd@det:5', 'nst-poly', 'cwd:5')
    """
    places: dict[str, list[str]] = {"": [], "det": []}
    for term in str(word).strip().lower().split("+"):
        name, colon, weight = term.partition(":")
        name, _, place = (part.strip() for part in name.partition("@"))
        if not name or place not in places or "@" in term.removeprefix(f"{name}{MARK}").removeprefix(name):
            raise ValueError(f"method '{word}': write a term as name, name:weight, name{MARK} or name{MARK}:weight")
        places[place].append(name + colon + weight)
    row = RowSpec(*(parse_method("+".join(terms) or LABELS_ONLY) for terms in places.values()))
    if places["det"] and not row.detector.names:
        raise ValueError(f"method '{word}': ce (labels only) learns from no teacher; leave out {MARK}")
    return row


@dataclass(frozen=True)
class Tuned:
    """What was found for one method: keys of its TRANSFER node, and the trials that it took."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 0


def read_tuned(path: Path) -> dict[str, Tuned]:
    """Return the methods of a file of ``nst-det tune``, by their canonical method strings."""
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


def weights_from(
    row: RowSpec, tuned: Mapping[str, Tuned], distill: Mapping[str, Any], detect: Mapping[str, Any]
) -> str:
    """Return where the weights of a row's terms are from, in a few words; "" for a row without terms.

    ``distill`` and ``detect`` are the TRANSFER nodes of the stages.
    """
    # the backbone of a row with terms of stage two is that of the row without them
    parts = [(row.backbone, row.backbone.word, distill), (row.detector, row.word, detect)]
    sources: list[str] = []
    for method, word, node in parts:
        if method.names and word in tuned:
            sources.append(f"tuned: {tuned[word].trials} trials")
            continue
        given, automatic = (node.get(key) or {} for key in ("WEIGHTS", "AUTO_WEIGHT"))
        for name, weight in method:
            if weight is not None:
                sources.append("weight in the word")
            elif name in automatic:
                sources.append("automatic weight")
            else:
                sources.append("configured weight" if name in given else "default weight")
    return ", ".join(dict.fromkeys(sources))


def default_config() -> CfgNode:
    """Return the keys of a comparison with their defaults.

    ========================  ======================================================================================
    NAME                      begins the names of the backbone files
    OUTPUT_DIR                where everything is written; "" takes output/NAME
    ENGINE                    detector engine: auto, detectron2 or torchvision
    METHODS                   transfer methods; ``ce`` (labels only) is always among them.  A term marked
                              ``@det`` works in stage two, from a teacher detector (``cwd@det``, ``kd+nst-poly@det``)
    SEEDS                     one whole set of rows a seed
    TUNED                     the tuned.yaml of ``nst-det tune``: weights and levels of the methods that are in it; ""
                              takes none
    ROWS                      detectors beside the methods': ``scratch`` (random backbone, always among them),
                              ``no-fpn`` (the backbone of ce, without FPN: its difference to ce is what FPN brings) and
                              ``teacher`` (the teacher's own backbone, as an upper mark)
    JOBS                      runs side by side; 0 takes one a GPU, or without a GPU one a core.  Those on GPUs share
                              the cores; what runs on the CPU beside them is not counted
    THREADS                   CPU threads of stage one (a detector has one); 0 takes the cores, at most 8
    DATA.GENERATE             settings of the generated data set; {} generates none
    DATA.ROOT                 where it is written; "" takes OUTPUT_DIR/data
    DISTILL.CONFIG, .OPTS     stage one's YAML (relative to this file) and KEY VALUE pairs on top of it
    DETECT.CONFIG, .OPTS      the same of stage two
    DETECT.SCRATCH_OPTS       KEY VALUE pairs for the detectors of the row ``scratch`` alone
    DETECT.NO_FPN_OPTS        KEY VALUE pairs for the detectors of the row ``no-fpn`` alone
    DETECT.TEACHER_OPTS       KEY VALUE pairs for the detectors of the row ``teacher`` alone, and for the detector that
                              teaches those with ``@det`` (it is trained once, with seed 0, unless stage two's config
                              names one by TEACHER)
    ========================  ======================================================================================
    """
    config = CfgNode()
    config.NAME = "comparison"
    config.OUTPUT_DIR = ""
    config.ENGINE = "auto"
    config.METHODS = ["kd", "nst-poly"]
    config.SEEDS = [0]
    config.TUNED = ""
    config.ROWS = [SCRATCH]
    config.JOBS = 0
    config.THREADS = 0
    config.DATA = CfgNode()
    config.DATA.GENERATE = CfgNode(new_allowed=True)
    config.DATA.ROOT = ""
    config.DISTILL = CfgNode({"CONFIG": "", "OPTS": []})
    config.DETECT = CfgNode({"CONFIG": "", "OPTS": [], "SCRATCH_OPTS": [], "NO_FPN_OPTS": [], "TEACHER_OPTS": []})
    return config


@dataclass(frozen=True)
class Comparison:
    """A comparison with everything resolved and checked.

    Attributes:
        methods: the rows that learn by a method, by canonical method string, ``ce`` first.
        rows: those of ROWS, ``scratch`` first.
        data_root: of the generated data set; None without one.
        distill: stage one's whole config, before the settings of a single run.
        detect: the same of stage two.
        row_opts: KEY VALUE pairs that a row of ROWS adds in stage two.
        tuned: what a search found, by method string.
        claim: what must not change between two calls on one folder.
    """

    name: str
    folder: Path
    engine: str
    methods: Mapping[str, RowSpec]
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    jobs: int
    threads: int
    generate: dict[str, Any]
    data_root: Path | None
    distill: CfgNode
    detect: CfgNode
    row_opts: dict[str, tuple[str, ...]]
    tuned: Mapping[str, Tuned]
    claim: dict[str, Any]

    @property
    def students(self) -> tuple[str, ...]:
        """The methods of stage one that the rows start from, each once: ``ce`` and then by their rows."""
        return tuple(dict.fromkeys(row.backbone.word for row in self.methods.values()))

    @property
    def all_rows(self) -> tuple[str, ...]:
        """Rows of the table in order: scratch, the methods (those with terms of stage two last), then teacher."""
        methods = sorted(self.methods, key=lambda word: bool(self.methods[word].detector.names))
        return (SCRATCH, *methods, *(row for row in self.rows if row != SCRATCH))


def load_comparison(file: str | Path, output: str | Path | None = None, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a comparison before anything is started.

    Args:
        file: the YAML of the comparison.
        output: takes the place of OUTPUT_DIR.
        overrides: KEY VALUE pairs; ``DISTILL.X.Y 3`` and ``DETECT.X.Y 3`` set X.Y of that stage's own config.

    Raises:
        UserError: a key, method or value in the comparison or in a stage's config can't be used.
    """
    own, forwarded = _split(overrides)
    config = load_config(default_config(), file, own)
    if config.JOBS < 0 or config.THREADS < 0:
        raise UserError(f"{file}: JOBS and THREADS can't be negative; 0 takes the number of cores")
    with errors_of(f"{file}: NAME"):
        check_name(config.NAME)
    methods, seeds, rows = _methods(config.METHODS, file), _seeds(config.SEEDS, file), _rows(config.ROWS, file)
    folder = Path(expand_path(str(output or config.OUTPUT_DIR or f"output/{config.NAME}"), "OUTPUT_DIR")).resolve()
    files = {}
    for stage in STAGES:
        if not (name := config[stage.prefix].CONFIG):
            raise UserError(f"{file}: {stage.prefix}.CONFIG names no file; give the YAML of {stage.title}")
        files[stage] = path_beside(name, f"{stage.prefix}.CONFIG", file, own)
    engine = resolve_engine(config.ENGINE, files[DETECT], str(file))
    distill, detect = (
        _stage_config(stage, files[stage], engine, config, forwarded[stage.prefix], file) for stage in STAGES
    )
    check_hand_over(distill, detect, str(file))
    if detect.METHOD != BASELINE and any(row.detector.names for row in methods.values()):
        raise UserError(
            f"{file}: DETECT.METHOD {detect.METHOD} is for every row, so rows with @det can't have "
            "their own; set it to ce"
        )
    row_opts, claimed_opts = {}, {}
    for row in EXTRA_ROWS:
        key = f"{row.upper().replace('-', '_')}_OPTS"
        words = tuple(str(word) for word in config.DETECT[key])
        claimed_opts[f"DETECT.{key}"] = list(words)
        if row == NO_FPN:
            words = (*without_fpn(detect), *words) if row in rows else ()
        merge_stage(detect, words, f"{file}: DETECT.{key}")
        row_opts[row] = words
    generate, data_root = plain(config.DATA.GENERATE), None
    if generate:
        root = expand_path(config.DATA.ROOT, "DATA.ROOT")
        data_root = Path(root).resolve() if root else folder / "data"
        check_generated(generate, data_root, str(file))
    threads = config.THREADS or _recorded_threads(folder) or min(core_count(), MOST_THREADS)
    claim = {key: value for key, value in plain(flat(config)).items() if key.split(".")[0] not in GROWING_KEYS}
    claim |= {"ENGINE": engine, "THREADS": threads, **claimed_opts}
    for stage, node in ((DISTILL, distill), (DETECT, detect)):
        of_all_runs = {key: value for key, value in plain(flat(node)).items() if key not in stage.run_keys}
        claim |= {f"{stage.prefix}.{key}": value for key, value in of_all_runs.items() if concerns(key, RESUME)}
    return Comparison(
        name=config.NAME,
        folder=folder,
        engine=engine,
        methods=methods,
        seeds=seeds,
        rows=rows,
        jobs=config.JOBS,
        threads=threads,
        generate=generate,
        data_root=data_root,
        distill=distill,
        detect=detect,
        row_opts=row_opts,
        tuned=read_tuned(path_beside(config.TUNED, "TUNED", file, own)) if config.TUNED else {},
        claim=claim,
    )


def without_fpn(detect: CfgNode) -> tuple[str, ...]:
    """Return KEY VALUE pairs that take FPN out of a detector: proposals and boxes from the map of stride 16 alone.

    Anchors of all levels are on that map.
    """
    if detect.MODEL.BACKBONE.NAME != "build_timm_fpn_backbone":
        raise UserError(
            f"ROWS: no-fpn: DETECT.MODEL.BACKBONE.NAME {detect.MODEL.BACKBONE.NAME} can't have its FPN taken out; "
            "build_timm_fpn_backbone can"
        )
    anchors = detect.MODEL.ANCHOR_GENERATOR
    sizes, ratios = (
        sorted({value for row in rows for value in row}) for rows in (anchors.SIZES, anchors.ASPECT_RATIOS)
    )
    settings = {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [sizes],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [ratios],
    }
    return tuple(str(word) for pair in settings.items() for word in pair)


def merge_stage(config: CfgNode, words: Sequence[str], source: str) -> CfgNode:
    """Return a copy of a stage's config with KEY VALUE pairs on top; ``source`` is named in errors."""
    merged = config.clone()
    merged.defrost()
    with errors_of(source):
        merge_overrides(merged, words)
    merged.freeze()
    return merged


def path_beside(name: str, key: str, file: str | Path, overrides: Sequence[str]) -> Path:
    """Return the path that ``key`` names: beside ``file``, or as it is where it was typed on the command line."""
    path = Path(expand_path(name, key))
    return path if key in overrides[::2] else Path(os.path.normpath(Path(file).parent / path))


def _split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Part the command line's pairs into the comparison's own and those that a stage's config gets."""
    known = flat(default_config())
    own: list[str] = []
    forwarded: dict[str, list[str]] = {stage.prefix: [] for stage in STAGES}
    for key, value in key_values(overrides):
        prefix, _, rest = key.partition(".")
        (forwarded[prefix] if key not in known and prefix in forwarded and rest else own).extend((key, value))
    return own, forwarded


def _stage_config(
    stage: Stage, path: Path, engine: str, config: CfgNode, forwarded: Sequence[str], file: str | Path
) -> CfgNode:
    opts = [str(word) for word in config[stage.prefix].OPTS]
    # in a tree of its own, so that an error names the key as it was typed
    typed = CfgNode()
    typed[stage.prefix] = merge_stage(stage.load(path, engine), opts, f"{file}: {stage.prefix}.OPTS")
    typed.defrost()
    merge_overrides(typed, forwarded)
    typed.freeze()
    return typed[stage.prefix]


def _methods(words: Sequence[Any], file: str | Path) -> dict[str, RowSpec]:
    with errors_of(f"{file}: METHODS", ValueError):
        rows = [parse_row(word) for word in words]
    _refuse_twice([row.word for row in rows], "METHODS", file)
    return {BASELINE: parse_row(BASELINE)} | {row.word: row for row in rows}


def _seeds(seeds: Sequence[Any], file: str | Path) -> tuple[int, ...]:
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        raise UserError(f"{file}: SEEDS must be a list of whole numbers from 0 up, like [0, 1, 2], but is {seeds!r}")
    _refuse_twice(seeds, "SEEDS", file)
    return tuple(sorted(seeds))


def _refuse_twice(items: Sequence[Any], key: str, file: str | Path) -> None:
    for item in items:
        if items.count(item) > 1:
            raise UserError(f"{file}: {key}: {item} stands there twice; leave one out")


def _rows(rows: Sequence[Any], file: str | Path) -> tuple[str, ...]:
    for row in rows:
        if row not in EXTRA_ROWS:
            raise UserError(f"{file}: ROWS: unknown row {row!r}; known are {', '.join(EXTRA_ROWS)}")
    return tuple(row for row in EXTRA_ROWS if row == SCRATCH or row in rows)


def _recorded_threads(folder: Path) -> int:
    """Return the threads that an earlier call on this folder had: sums over threads must not change their order."""
    path = RunFolder(folder).config_path
    recorded = read_json(path).get("THREADS", 0) if path.exists() else 0
    return recorded if isinstance(recorded, int) else 0
