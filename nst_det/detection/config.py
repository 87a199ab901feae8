"""The detection config: Detectron2's key tree, the keys that this project adds, and what each engine takes of it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.detection.augment import AUGMENTATION_KEYS, PRESETS, check_augmentation
from nst_det.detection.d2_defaults import DETECTRON2_ONLY, HONORED
from nst_det.engine.config import expand_path, flat, key_values, load_config, merge_tree, parse_value, read_yaml
from nst_det.engine.keys import (
    COMPILE,
    EMA_DECAY,
    NON_FINITE_KEYS,
    OFF,
    TENSORBOARD,
    TRANSFER_KEYS,
    TRUST_PICKLE,
    WANDB,
    Key,
    at_least,
    below_one,
    config_tree,
    one_of,
)
from nst_det.engine.metrics import check_wandb
from nst_det.errors import UserError

log = logging.getLogger(__name__)

# of TEST.SELECT
LAST, BEST = "last", "best"
ENGINES = ("auto", "detectron2", "torchvision")
INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


# the softer targets of classification are noise to a detector (Chen et al. 2017, who tried others; mdistiller's
# detectors have 1 too)
DETECTOR_TRANSFER_KEYS = {
    **TRANSFER_KEYS,
    "LEVELS": Key([], "p2 .. p6, or res2 .. res5 below an FPN, or student:teacher"),
    "OPTIONS": TRANSFER_KEYS["OPTIONS"]._replace(default={"kd": {"temperature": 1.0}, "dkd": {"others": 0.25}}),
    "WARMUP_ITERS": at_least(TRANSFER_KEYS["WARMUP_ITERS"].meaning, 0, default=0),
}

# this project's keys, in both engines
ADDED: dict[str, Key] = {
    "ENGINE": Key("auto", "detectron2, torchvision, or auto: Detectron2 where it is installed"),
    "TRUST_PICKLE": TRUST_PICKLE,
    "TENSORBOARD": TENSORBOARD,
    "WANDB": WANDB,
    "METHOD": Key("ce", "transfer method while the detector trains; ce for none"),
    "TEACHER.CONFIG_FILE": Key("", "the config of the teacher detector"),
    "TEACHER.WEIGHTS": Key("", "weights in place of those that it names"),
    **{f"TRANSFER.{name}": key for name, key in DETECTOR_TRANSFER_KEYS.items()},
    "MODEL.TIMM.ARCH": Key("resnet18", "timm name of the network of build_timm_backbone and build_timm_fpn_backbone"),
    "MODEL.TIMM.PRETRAINED": Key(False, "begin with timm's published weights"),
    "MODEL.TIMM.NORM": one_of("its batch normalization", "FrozenBN", "BN", "SyncBN"),
    "MODEL.TIMM.OUT_FEATURES": Key(["res2", "res3", "res4", "res5"], "levels that it gives"),
    "MODEL.TIMM.KWARGS": Key({}, "more arguments of the network"),
    "MODEL.KEEP_CLASSES": Key(
        False,
        "if the weights are those of a detector of other classes: keep the box predictor's rows of the classes that "
        "both have by name, and of the background; False starts the predictor anew",
    ),
    "MODEL.CLASS_ALIASES": Key(
        {}, "for KEEP_CLASSES: name in the data -> name in the weights; VOC's names of COCO's classes are known"
    ),
    "MODEL.WEIGHTS_CLASSES": Key(
        [],
        "classes of a detector's weights in the order of their labels, where the file doesn't say; [] takes COCO's for "
        "KEEP_CLASSES, if there are 80, or 90 by torchvision's numbers",
    ),
    "MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE": Key(
        224, "boxes of this size in pixels are pooled from CANONICAL_LEVEL; Detectron2 has no keys for these constants"
    ),
    "MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL": Key(4, "number of that level"),
    "SOLVER.AMP.DTYPE": one_of(
        "auto is bf16 where the device is fast in it, else float32; heads stay in float32 with Detectron2 on a CPU "
        "alone",
        "auto",
        "bf16",
    ),
    "SOLVER.COMPILE": COMPILE,
    "INPUT.PADDED_SIZES": Key(
        [],
        "heights and widths, such as [[800, 1344], [1344, 800], [1344, 1344]], to the smallest of which training "
        "batches are padded (torchvision engine); [] pads to the largest image, or with SOLVER.COMPILE, to "
        "have few sizes, to wide, tall and square ones of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN",
        "a list of [height, width], above 0",
        lambda sizes: all(
            isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
            for size in sizes
        ),
    ),
    **AUGMENTATION_KEYS,
    "SOLVER.OPTIMIZER": one_of("the optimizer", "SGD", "ADAMW"),
    "SOLVER.BACKBONE_MULTIPLIER": Key(1.0, "learning rate of the bottom-up as a part of BASE_LR"),
    "SOLVER.ACCUMULATE": at_least(
        "number of parts into which each process splits its images of a step, computed one after another to save "
        "memory (torchvision engine)",
        1,
        default=1,
    ),
    "SOLVER.EMA_DECAY": EMA_DECAY,
    **{f"SOLVER.NON_FINITE.{name}": key for name, key in NON_FINITE_KEYS.items()},
    "DATASETS.VOC": Key({}, "name -> {ROOT, SPLIT}: folders in VOC layout, for DATASETS.TRAIN, VAL and TEST"),
    "DATASETS.VAL": Key([], "what is validated on, instead of a part of DATASETS.TRAIN"),
    "DATASETS.CLASSES": Key([], "in the order of their labels; [] takes those in the data, sorted"),
    "DATASETS.USE_DIFFICULT": Key(False, "train on objects marked difficult too"),
    "DATASETS.VAL_FRACTION": below_one(
        "share of the images of each data set in DATASETS.TRAIN that is held out for validation, some of each class; "
        "the same images whatever the SEED",
        "validation",
        0.2,
    ),
    "DATASETS.VAL_SEED": Key(0, "chooses these images"),
    "TEST.AMP": Key(False, "evaluate and predict in the precision of SOLVER.AMP; False is float32"),
    "TEST.SELECT": one_of(
        "the weights that are evaluated on DATASETS.TEST, once; best has the highest mAP on the validation split",
        LAST,
        BEST,
    ),
    "TEST.PATIENCE": at_least(
        "early stopping: validations in a row without a higher mAP after which training stops; 0 never stops it", 0, 0
    ),
    "DATALOADER.CACHE_IMAGES_MB": at_least(
        "decoded images are kept in memory if all of a set fit in this", 0, default=1024
    ),
}


def detector_transfer_node() -> CfgNode:
    """Return the ``TRANSFER`` keys of stage two: those of both stages, and its own temperature."""
    return config_tree(DETECTOR_TRANSFER_KEYS)


def add_nst_det_config(cfg: CfgNode) -> None:
    """Add this project's keys to a config with Detectron2's tree (its ``get_cfg()``, or the torchvision engine's)."""
    config_tree(ADDED, cfg)


def get_defaults() -> CfgNode:
    """Return the torchvision engine's keys with their defaults, which are Detectron2's."""
    return config_tree({**HONORED, **ADDED})


def load_detect_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return the torchvision engine's config of a YAML file and ``KEY VALUE`` pairs, checked and frozen."""
    source = str(file or "command line")
    if file is not None:
        _refuse_detectron2_only(_tree_keys(read_yaml(file)), source)
    _refuse_detectron2_only((key for key, _ in key_values(overrides)), "command line")
    config = load_with_preset(get_defaults(), file, overrides)
    check_config(config, source)
    return config


def load_with_preset(defaults: CfgNode, file: str | Path | None, overrides: Sequence[str]) -> CfgNode:
    """Return what ``load_config`` does, with INPUT.AUGMENTATION's values of :data:`PRESETS` as defaults."""
    config = load_config(defaults, file, overrides)
    preset = PRESETS.get(config.INPUT.AUGMENTATION)
    if not preset:
        return config
    defaults.merge_from_list([part for item in preset.items() for part in item])
    return load_config(defaults, file, overrides)


def config_of_run(file: Path) -> CfgNode:
    """Return the torchvision engine's config of a run by either engine; Detectron2's names all keys of its own."""
    tree = read_yaml(file)
    if not isinstance(tree.get("MODEL"), dict):
        raise UserError(f"{file}: not the config of a detector; name the folder of a train-det run")
    if tree.get("ENGINE") == "torchvision":
        return load_detect_config(file)
    config = get_defaults()
    merge_tree(config, _without(tree, DETECTRON2_ONLY), str(file))
    check_config(config, str(file))
    config.freeze()
    return config


def _without(tree: Mapping[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """Return a tree without some dotted keys."""
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in keys
    }


def _tree_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _tree_keys(value, f"{prefix}{key}.")


def _refuse_detectron2_only(keys: Iterator[str], source: str) -> None:
    for key in keys:
        if any(key == name or key.startswith(f"{name}.") for name in DETECTRON2_ONLY):
            raise UserError(
                f"{source}: the torchvision engine can't honor {key}; remove it, or install Detectron2 "
                f"({INSTALL_PAGE}) and set ENGINE detectron2"
            )


def check_config(config: CfgNode, source: str = "detection config") -> None:
    """Refuse values that the torchvision engine can't honor."""
    for key, value, limit in _wrong_values(config, HONORED):
        raise UserError(
            f"{source}: the torchvision engine can't honor {key} {value!r}; set it to {limit.wanted}, or see whether "
            "ENGINE detectron2 takes it"
        )
    check_added_keys(config, source)
    model, sizes = config.MODEL, config.INPUT.MIN_SIZE_TRAIN
    if len(model.PIXEL_MEAN) != 3 or len(model.PIXEL_STD) != 3 or min(model.PIXEL_STD) <= 0:
        raise UserError(f"{source}: MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be three numbers, the latter above 0")
    of_range = config.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if not sizes or (of_range and (len(sizes) != 2 or sizes[0] > sizes[1])):
        raise UserError(
            f"{source}: INPUT.MIN_SIZE_TRAIN must be a list of sizes, and two of them, the smaller first, to sample a "
            "range"
        )
    _check_levels(model, source)
    longest = config.INPUT.MAX_SIZE_TRAIN
    if config.INPUT.PADDED_SIZES and not any(min(size) >= longest for size in config.INPUT.PADDED_SIZES):
        raise UserError(
            f"{source}: INPUT.PADDED_SIZES: a batch of wide and tall images fits in none of them; add "
            f"[{longest}, {longest}], as INPUT.MAX_SIZE_TRAIN is {longest}"
        )


def padded_sizes(config: CfgNode) -> list[tuple[int, int]]:
    """Return the (height, width) that training batches may be padded to; none where each has its own."""
    given = config.INPUT.PADDED_SIZES
    if given or config.SOLVER.COMPILE == OFF:
        return [(height, width) for height, width in given]
    short, long = min(max(config.INPUT.MIN_SIZE_TRAIN), config.INPUT.MAX_SIZE_TRAIN), config.INPUT.MAX_SIZE_TRAIN
    return [(short, long), (long, short), (long, long)]


def check_added_keys(config: CfgNode, source: str) -> None:
    """Refuse values of this project's keys that neither engine can follow."""
    for key, value, limit in _wrong_values(config, ADDED):
        raise UserError(f"{source}: {key} is {value!r}; set it to {limit.wanted}")
    for name, entry in config.DATASETS.VOC.items():
        if not isinstance(entry, dict) or set(entry) - {"ROOT", "SPLIT"}:
            raise UserError(f"{source}: DATASETS.VOC.{name}: give {{ROOT: folder, SPLIT: list}} and nothing else")
    for key, off in (("SELECT", LAST), ("PATIENCE", 0)):
        if config.TEST[key] != off and not (validates(config) and config.TEST.EVAL_PERIOD):
            raise UserError(
                f"{source}: TEST.{key} {config.TEST[key]} needs a validation split to choose by, and a period at "
                f"which to validate; set DATASETS.VAL_FRACTION (such as 0.2) or VAL, and TEST.EVAL_PERIOD, or "
                f"TEST.{key} {off}"
            )
    if config.MODEL.CLASS_ALIASES and not config.MODEL.KEEP_CLASSES:
        raise UserError(f"{source}: MODEL.CLASS_ALIASES is for MODEL.KEEP_CLASSES True; set that, or leave it out")
    if config.DATASETS.VAL and config.DATASETS.VAL_FRACTION:
        raise UserError(f"{source}: DATASETS.VAL and VAL_FRACTION both say what to validate on; set one of them")
    if config.SOLVER.EMA_DECAY and config.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            f"{source}: SOLVER.EMA_DECAY {config.SOLVER.EMA_DECAY}: TEST.PRECISE_BN measures the statistics of the "
            "weights in training, not of their average; set TEST.PRECISE_BN.ENABLED False, or SOLVER.EMA_DECAY 0"
        )
    if config.TEST.AMP and not config.SOLVER.AMP.ENABLED:
        raise UserError(f"{source}: TEST.AMP True needs SOLVER.AMP.ENABLED True; set it, or TEST.AMP False")
    check_augmentation(config.INPUT, source)
    check_wandb(config.WANDB, source)


def _wrong_values(config: CfgNode, keys: Mapping[str, Key]) -> Iterator[tuple[str, Any, Key]]:
    values = flat(config)
    for key, limit in keys.items():
        if limit.wanted and not limit.takes(values[key]):
            yield key, values[key], limit


def _check_levels(model: CfgNode, source: str) -> None:
    levels = set(model.TIMM.OUT_FEATURES)
    _check_known(model.TIMM.OUT_FEATURES, {"res2", "res3", "res4", "res5"}, "MODEL.TIMM.OUT_FEATURES", source)
    if model.BACKBONE.NAME == "build_timm_fpn_backbone":
        _check_known(model.FPN.IN_FEATURES, levels, "MODEL.FPN.IN_FEATURES", source)
        numbers = [int(name[3:]) for name in model.FPN.IN_FEATURES]
        levels = {f"p{number}" for number in [*numbers, max(numbers) + 1]}
    _check_known(model.RPN.IN_FEATURES, levels, "MODEL.RPN.IN_FEATURES", source)
    _check_known(model.ROI_HEADS.IN_FEATURES, levels, "MODEL.ROI_HEADS.IN_FEATURES", source)
    for key in ("SIZES", "ASPECT_RATIOS"):
        rows, count = model.ANCHOR_GENERATOR[key], len(model.RPN.IN_FEATURES)
        lists = rows and all(isinstance(row, list | tuple) and row for row in rows)
        if not lists or len(rows) not in (1, count):
            raise UserError(
                f"{source}: MODEL.ANCHOR_GENERATOR.{key} must be a list of lists, like [[32], [64]]: one, or {count} "
                "for the levels of MODEL.RPN.IN_FEATURES"
            )


def _check_known(names: Sequence[str], known: set[str], key: str, source: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        problem = f"no level '{unknown[0]}'" if unknown else "is empty"
        raise UserError(f"{source}: {key}: {problem}; there are {', '.join(sorted(known))}")


def engine_is_installed() -> bool:
    """Return whether Detectron2 is installed; nothing is imported."""
    spec = importlib.util.find_spec("detectron2")
    # a folder of this name, such as a clone that was not installed, has no file to import
    return spec is not None and spec.origin is not None


def choose_engine(wanted: str, source: str = "command line") -> str:
    """Return ``detectron2`` or ``torchvision``; auto takes Detectron2 where it is installed, and logs which."""
    if wanted not in ENGINES:
        raise UserError(f"{source}: ENGINE '{wanted}' is not one of {', '.join(ENGINES)}")
    if wanted == "torchvision":
        return wanted
    installed = engine_is_installed()
    if wanted == "detectron2" and not installed:
        raise UserError(
            f"{source}: ENGINE detectron2: Detectron2 is not installed; see {INSTALL_PAGE}, or set ENGINE torchvision"
        )
    chosen = "detectron2" if installed else "torchvision"
    if wanted == "auto":
        log.info("ENGINE auto: Detectron2 is %sinstalled, taking %s", "" if installed else "not ", chosen)
    return chosen


def wanted_engine(file: str | Path | None, overrides: Sequence[str]) -> str:
    """Return ENGINE of a YAML file with ``KEY VALUE`` pairs on top, before either engine's tree is chosen."""
    given = dict(key_values(overrides)).get("ENGINE")
    if given is not None:
        return str(parse_value(given))
    return str((read_yaml(file) if file is not None else {}).get("ENGINE", "auto"))


def validates(config: CfgNode) -> bool:
    """Return whether a config has a validation split."""
    return bool(config.DATASETS.VAL or config.DATASETS.VAL_FRACTION)


def set_names(config: CfgNode) -> list[str]:
    """Return the names of the data sets that a config trains, validates and tests on, each once."""
    return list(dict.fromkeys(name for part in ("TRAIN", "VAL", "TEST") for name in config.DATASETS[part]))


def check_known(config: CfgNode, names: Sequence[str], key: str) -> None:
    """Refuse data sets that ``key`` names and DATASETS.VOC doesn't have."""
    for name in names:
        if config.DATASETS.VOC.get(name) is None:
            known = ", ".join(config.DATASETS.VOC) or "nothing"
            raise UserError(f"{key}: no data set '{name}' in DATASETS.VOC, which has {known}")


def check_one_test_set(config: CfgNode, key: str) -> None:
    """Refuse several data sets in DATASETS.TEST, which ``key`` is, for the torchvision engine."""
    if len(config.DATASETS.TEST) > 1:
        raise UserError(f"{key}: the torchvision engine evaluates one data set a run; name one")


def voc_roots(config: CfgNode, names: Sequence[str], key: str) -> list[tuple[Path, str]]:
    """Return (root, split) of each data set that ``key`` names; it must be an entry of DATASETS.VOC."""
    check_known(config, names, key)
    roots = []
    for name in names:
        entry = config.DATASETS.VOC[name]
        for field in ("ROOT", "SPLIT"):
            if not isinstance(entry.get(field), str) or not entry[field]:
                raise UserError(f"DATASETS.VOC.{name}.{field} is missing; give the folder and the split's name")
        roots.append((Path(expand_path(entry.ROOT, f"DATASETS.VOC.{name}.ROOT")), entry.SPLIT))
    return roots


@contextmanager
def defrosted(config: CfgNode) -> Iterator[None]:
    """Let the block change a config; it is frozen again afterwards if it was."""
    frozen = config.is_frozen()
    config.defrost()
    try:
        yield
    finally:
        if frozen:
            config.freeze()


def listed_classes(config: CfgNode) -> tuple[str, ...]:
    """Return the names in DATASETS.CLASSES; YAML reads digits as numbers."""
    return tuple(map(str, config.DATASETS.CLASSES))


def resolve_classes(config: CfgNode, classes: Sequence[str]) -> None:
    """Set MODEL.ROI_HEADS.NUM_CLASSES where it is 0, and compare it with the data where it is not."""
    stated = config.MODEL.ROI_HEADS.NUM_CLASSES
    if stated not in (0, len(classes)):
        raise UserError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {stated}, but the data has {len(classes)} classes "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); set it to {len(classes)}, or 0"
        )
    with defrosted(config):
        config.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)


def resolve_device(name: str) -> str:
    """Return MODEL.DEVICE as it can be used here: ``auto`` is the GPU where there is one, else the CPU.

    The CPU also stands in for a GPU that is named, as in Detectron2's default, with a warning.
    """
    # torch takes seconds to import
    import torch

    from nst_det.engine.device import default_device

    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE: no device '{name}'; set it to cpu, cuda, cuda:1 or auto") from error
    here = default_device().type
    if name.startswith("cuda") and here == "cpu":
        log.warning("MODEL.DEVICE %s: no GPU here, taking the CPU", name)
        return here
    return here if name == "auto" else name


def check_device(config: CfgNode, processes: int) -> None:
    """Refuse a MODEL.DEVICE that would put all of several processes on one GPU."""
    if processes > 1 and config.MODEL.DEVICE.startswith("cuda:"):
        raise UserError(
            f"MODEL.DEVICE {config.MODEL.DEVICE}: each of {processes} processes takes its own GPU; set it to cuda, "
            "and choose the GPUs by CUDA_VISIBLE_DEVICES"
        )


def resolve_machine(config: CfgNode) -> None:
    """Set MODEL.DEVICE and DATALOADER.NUM_WORKERS to what they are on this machine, for either engine."""
    from nst_det.engine.device import loader_workers

    with defrosted(config):
        config.MODEL.DEVICE = resolve_device(config.MODEL.DEVICE)
        config.DATALOADER.NUM_WORKERS = loader_workers(config.DATALOADER.NUM_WORKERS, none=config.MODEL.DEVICE == "cpu")
