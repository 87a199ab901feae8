"""What a comparison is asked to do: its own few keys, and the two stages' configs that it hands on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.comparison.stages import DETECT, DISTILL, STAGES, Stage, check_generated, check_hand_over, resolve_engine
from nst_det.engine.config import expand_path, flat, key_values, load_config, merge_overrides, plain, read_yaml
from nst_det.engine.device import core_count
from nst_det.engine.fingerprint import RESUME, concerns
from nst_det.engine.io import read_json
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.losses import LABELS_ONLY, Method, parse_method

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
    """Where the terms of one row work.

    Attributes:
        backbone: the method of stage one; ``ce`` where the word names none.
        detector: the method of stage two, without its marks; ``ce`` where it names none.
    """

    backbone: Method
    detector: Method

    @property
    def word(self) -> str:
        """The canonical word: two rows are equal exactly if their words are."""
        parted = [term.partition(":") for term in self.detector.word.split("+") if self.detector.names]
        marked = [name + MARK + colon + weight for name, colon, weight in parted]
        return "+".join([*([self.backbone.word] if self.backbone.names or not marked else []), *marked])


def parse_row(word: str) -> RowSpec:
    """A row's method from its word.

    Args:
        word: terms joined by ``+``, each with ``@det`` where it works in stage two and with ``:weight`` where that
            isn't to be the configured one.

    Raises:
        ValueError: a word that isn't one, see :func:`nst_det.losses.parse_method`.

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


def default_config() -> CfgNode:
    """The keys of a comparison with their defaults.

    ========================  ======================================================================================
    NAME                      begins the names of the backbone files
    OUTPUT_DIR                where everything is written; "" takes output/NAME
    ENGINE                    detector engine: auto, detectron2 or torchvision
    METHODS                   words of transfer methods; ``ce`` (labels only) is always among them.  A term marked
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
                              names one by TRANSFER.TEACHER)
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

    ``methods`` are canonical words, ``ce`` first.  ``distill`` and ``detect`` are the stages' whole configs before
    the settings of a single run; ``row_opts`` holds what a row of its own adds, ``tuned`` what was found for the
    methods by a search.  ``claim`` is what must not change between two calls on one folder.
    """

    name: str
    folder: Path
    engine: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[str, ...]
    jobs: int
    threads: int
    generate: dict[str, Any]
    data_root: Path | None
    distill: CfgNode
    detect: CfgNode
    row_opts: dict[str, tuple[str, ...]]
    tuned: dict[str, Tuned]
    claim: dict[str, Any]

    @property
    def students(self) -> tuple[str, ...]:
        """The methods of stage one that the rows start from, each once: ``ce`` and then by their rows."""
        return tuple(dict.fromkeys(parse_row(word).backbone.word for word in self.methods))

    @property
    def learns_from_detector(self) -> bool:
        """Whether any row has terms of stage two."""
        return any(parse_row(word).detector.names for word in self.methods)

    @property
    def all_rows(self) -> tuple[str, ...]:
        """Rows of the table in order: scratch, the methods (those with terms of stage two last), then teacher."""
        methods = sorted(self.methods, key=lambda word: bool(parse_row(word).detector.names))
        return (SCRATCH, *methods, *(row for row in self.rows if row != SCRATCH))


def load_comparison(file: str | Path, output: str | Path | None = None, overrides: Sequence[str] = ()) -> Comparison:
    """Read and check a comparison before anything is started.

    Args:
        file: the YAML of the comparison.
        output: takes the place of OUTPUT_DIR.
        overrides: KEY VALUE pairs; ``DISTILL.X.Y 3`` and ``DETECT.X.Y 3`` set X.Y of that stage's own config.

    Raises:
        UserError: a key, word or value in the comparison or in a stage's config can't be used.
    """
    own, forwarded = _split(overrides)
    config = load_config(default_config(), file, own)
    methods = _methods(config.METHODS, str(file))
    seeds = _seeds(config.SEEDS, str(file))
    rows = _rows(config.ROWS, str(file))
    _check_name(config.NAME, str(file))
    folder = Path(expand_path(str(output or config.OUTPUT_DIR or f"output/{config.NAME}"), "OUTPUT_DIR")).resolve()
    files = {stage.prefix: _stage_file(stage, config, Path(file), own) for stage in STAGES}
    engine = resolve_engine(config.ENGINE, files[DETECT.prefix], str(file))
    distill, detect = (
        _stage_config(stage, config, files[stage.prefix], forwarded[stage.prefix], engine, str(file))
        for stage in STAGES
    )
    row_opts = {
        SCRATCH: _words(config.DETECT.SCRATCH_OPTS),
        NO_FPN: (*without_fpn(detect), *_words(config.DETECT.NO_FPN_OPTS)) if NO_FPN in rows else (),
        TEACHER: _words(config.DETECT.TEACHER_OPTS),
    }
    for row, words in row_opts.items():
        merge_stage(detect, words, f"{file}: DETECT.{_key(row)}_OPTS")
    check_hand_over(distill, detect, str(file))
    if detect.TRANSFER.METHOD != BASELINE and any(parse_row(word).detector.names for word in methods):
        raise UserError(
            f"{file}: DETECT.TRANSFER.METHOD {detect.TRANSFER.METHOD} is for every row, so rows with @det can't have "
            "their own; set it to ce"
        )
    tuned = _tuned(config.TUNED, Path(file), own)
    generate = plain(config.DATA.GENERATE)
    root = Path(expand_path(config.DATA.ROOT, "DATA.ROOT")).resolve() if config.DATA.ROOT else folder / "data"
    if generate:
        check_generated(generate, root, str(file))
    claim = {key: value for key, value in plain(flat(config)).items() if key.split(".")[0] not in GROWING_KEYS}
    threads = config.THREADS or _recorded_threads(folder) or min(core_count(), MOST_THREADS)
    claim |= {"ENGINE": engine, "THREADS": threads, **_prefixed(DISTILL, distill), **_prefixed(DETECT, detect)}
    claim |= {f"DETECT.{_key(row)}_OPTS": list(_words(config.DETECT[f"{_key(row)}_OPTS"])) for row in row_opts}
    if config.JOBS < 0 or config.THREADS < 0:
        raise UserError(f"{file}: JOBS and THREADS can't be negative; 0 takes the number of cores")
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
        data_root=root if generate else None,
        distill=distill,
        detect=detect,
        row_opts=row_opts,
        tuned=tuned,
        claim=claim,
    )


def without_fpn(detect: CfgNode) -> tuple[str, ...]:
    """KEY VALUE pairs that take FPN out of a detector: proposals and boxes from the map of stride 16 alone.

    Anchors of all levels stand on that map.

    Raises:
        UserError: the detector has no FPN.
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


def _key(row: str) -> str:
    return row.upper().replace("-", "_")


def merge_stage(config: CfgNode, words: Sequence[str], source: str) -> CfgNode:
    """A copy of a stage's config with KEY VALUE pairs on top; ``source`` is named in errors.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    merged = config.clone()
    merged.defrost()
    try:
        merge_overrides(merged, words)
    except UserError as error:
        raise UserError(f"{source}: {str(error).removeprefix('command line: ')}") from error
    merged.freeze()
    return merged


def _split(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The command line's pairs: the comparison's own, and those that a stage's config gets."""
    known = flat(default_config())
    own: list[str] = []
    forwarded: dict[str, list[str]] = {stage.prefix: [] for stage in STAGES}
    for key, value in key_values(overrides):
        prefix, _, rest = key.partition(".")
        if key not in known and prefix in forwarded and rest:
            forwarded[prefix] += [rest, value]
        else:
            own += [key, value]
    return own, forwarded


def _stage_file(stage: Stage, config: CfgNode, file: Path, own: Sequence[str]) -> Path:
    key = f"{stage.prefix}.CONFIG"
    if not config[stage.prefix].CONFIG:
        raise UserError(f"{file}: {key} names no file; give the YAML of {stage.title}")
    path = Path(expand_path(config[stage.prefix].CONFIG, key))
    # a path typed on the command line is relative to where it is typed
    return path if key in own[::2] else Path(os.path.normpath(file.parent / path))


def _stage_config(stage: Stage, config: CfgNode, path: Path, forwarded: list[str], engine: str, source: str) -> CfgNode:
    resolved = stage.load(path, engine)
    resolved = merge_stage(resolved, _words(config[stage.prefix].OPTS), f"{source}: {stage.prefix}.OPTS")
    # in a tree of its own, so that an error names the key as it was typed
    typed = CfgNode()
    typed[stage.prefix] = resolved.clone()
    typed.defrost()
    merge_overrides(typed, [f"{stage.prefix}.{word}" if at % 2 == 0 else word for at, word in enumerate(forwarded)])
    typed.freeze()
    return typed[stage.prefix]


def _tuned(name: str, file: Path, own: Sequence[str]) -> dict[str, Tuned]:
    if not name:
        return {}
    path = Path(expand_path(name, "TUNED"))
    return read_tuned(path if "TUNED" in own[::2] else Path(os.path.normpath(file.parent / path)))


def _words(opts: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(word) for word in opts)


def _prefixed(stage: Stage, config: CfgNode) -> dict[str, Any]:
    """What a stage's config says of every run of it."""
    return {
        f"{stage.prefix}.{key}": value
        for key, value in plain(flat(config)).items()
        if concerns(key, RESUME) and key not in stage.run_keys
    }


def _check_name(name: str, source: str) -> None:
    from nst_det.models.registry import check_name

    try:
        check_name(name)
    except UserError as error:
        raise UserError(f"{source}: NAME: {error}") from error


def _methods(words: Sequence[Any], source: str) -> tuple[str, ...]:
    try:
        methods = [parse_row(str(word)).word for word in words]
    except ValueError as error:
        raise UserError(f"{source}: METHODS: {error}") from error
    _refuse_twice(methods, "METHODS", source)
    return (BASELINE, *(word for word in methods if word != BASELINE))


def _seeds(seeds: Sequence[Any], source: str) -> tuple[int, ...]:
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        raise UserError(f"{source}: SEEDS must be a list of whole numbers from 0 up, like [0, 1, 2], but is {seeds!r}")
    _refuse_twice(seeds, "SEEDS", source)
    return tuple(sorted(seeds))


def _refuse_twice(items: Sequence[Any], key: str, source: str) -> None:
    for item in items:
        if items.count(item) > 1:
            raise UserError(f"{source}: {key}: {item} stands there twice; leave one out")


def _rows(rows: Sequence[Any], source: str) -> tuple[str, ...]:
    for row in rows:
        if row not in EXTRA_ROWS:
            raise UserError(f"{source}: ROWS: unknown row {row!r}; known are {', '.join(EXTRA_ROWS)}")
    return tuple(row for row in EXTRA_ROWS if row == SCRATCH or row in rows)


def _recorded_threads(folder: Path) -> int:
    """The threads that an earlier call on this folder settled on: sums over threads must not change their order."""
    path = RunFolder(folder).config_path
    recorded = read_json(path).get("THREADS", 0) if path.exists() else 0
    return recorded if isinstance(recorded, int) else 0
