"""The detection config: Detectron2's key tree, the keys that this project adds, and what each engine takes of it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.detection.d2_defaults import DEFAULTS, DETECTRON2_ONLY, TAKEN_VALUES
from nst_det.engine.config import expand_path, flat, key_values, load_config, parse_value, read_yaml, transfer_node
from nst_det.engine.device import default_device, loader_workers
from nst_det.engine.metrics import check_wandb
from nst_det.engine.nan_guard import check_non_finite, non_finite_node
from nst_det.errors import UserError

log = logging.getLogger(__name__)

# of TEST.SELECT
LAST, BEST = "last", "best"
ENGINES = ("auto", "detectron2", "torchvision")
# the least that is taken
AT_LEAST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.EVAL_PERIOD": 0,
    "TRANSFER.WARMUP_ITERS": 0,
    "MODEL.ROI_HEADS.NUM_CLASSES": 0,
    "DATALOADER.NUM_WORKERS": -1,
    "DATALOADER.CACHE_IMAGES_MB": 0,
    "INPUT.MIN_SIZE_TEST": 0,
}
INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


def add_nst_det_config(cfg: CfgNode) -> None:
    """Add this project's keys to a config with Detectron2's tree (its ``get_cfg()``, or the torchvision engine's).

    ====================================  ==========================================================================
    ENGINE                                auto (Detectron2 where it is installed), detectron2 or torchvision
    TRUST_PICKLE                          open weights that are pickles with more than tensors in them (Detectron2's
                                          ``.pkl`` files), which can run code; ``--trust-pickle`` sets it
    TENSORBOARD                           write TensorBoard events into the run folder (True with Detectron2, which
                                          does so by itself)
    WANDB                                 a project at Weights & Biases (pip install wandb); "" for none
    TRANSFER                              see :func:`~nst_det.engine.config.transfer_node`; LEVELS are ``p2`` ..
                                          ``p6`` or ``res2`` .. ``res5``, WARMUP_ITERS raises the weights linearly
    METHOD                                the method; ``ce``: no transfer while the detector trains
    TRANSFER.OPTIONS.kd.temperature       1 here: the softer targets of classification are noise to a detector (Chen et
                                          al. 2017, who tried others; mdistiller's detectors have 1 too)
    TEACHER.CONFIG_FILE                   config of the teacher detector
    TEACHER.WEIGHTS                       its weights; "" takes those that its config names
    MODEL.TIMM.ARCH                       timm name of the backbone of build_timm_backbone and
                                          build_timm_fpn_backbone (both are values of MODEL.BACKBONE.NAME)
    MODEL.TIMM.PRETRAINED                 begin with timm's published weights
    MODEL.TIMM.NORM                       batch normalization of the backbone: FrozenBN, BN or SyncBN
    MODEL.TIMM.OUT_FEATURES               its levels
    MODEL.TIMM.KWARGS                     further arguments of the timm model
    FLOAT32_PRECISION                     (Detectron2's key) of float32 on a GPU, in convolutions and matrix products
                                          alike: ``highest`` is float32, ``high`` and ``medium`` are TF32, "" is torch's
                                          own (TF32 in convolutions, float32 in products), see
                                          :func:`~nst_det.engine.device.set_float32_precision`
    MODEL.ROI_HEADS.NUM_CLASSES           (Detectron2's key) 0 takes the number of classes of the data
    MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE size in pixels of the boxes that are pooled from ...
    MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL    ... this level; 224 and 4 are Detectron2's constants
    SOLVER.AMP.ENABLED                    (Detectron2's key) mixed precision; heads stay in float32, but not with
                                          Detectron2 on a GPU
    SOLVER.AMP.DTYPE                      bf16, or auto: bf16 where the device is fast in it, else float32, see
                                          :func:`~nst_det.engine.device.amp_dtype`
    SOLVER.CLIP_GRADIENTS.CLIP_TYPE       (Detectron2's key) value, norm (of each parameter), or full_model: the norm of
                                          all gradients together
    SOLVER.OPTIMIZER                      SGD or ADAMW
    SOLVER.BACKBONE_MULTIPLIER            learning rate of the bottom-up as a part of BASE_LR
    SOLVER.ACCUMULATE                     parts in which each process takes its images of a step, one after another, to
                                          save memory (torchvision engine); IMS_PER_BATCH is that of the whole step
    SOLVER.EMA_DECAY                      of an exponential moving average of the weights: 0 for none, or below 1, such
                                          as 0.999; the average is what is evaluated, chosen and written, see
                                          :class:`~nst_det.engine.averaged.AveragedWeights`
    SOLVER.NON_FINITE                     what is done where a loss or gradient is no number, see
                                          :func:`~nst_det.engine.nan_guard.non_finite_node`
    DATASETS.VOC                          name -> {ROOT, SPLIT}: folders in VOC layout, for DATASETS.TRAIN and TEST
    DATASETS.CLASSES                      names of the classes in order; [] takes those in the data, sorted
    DATASETS.USE_DIFFICULT                whether ``difficult`` objects are trained on
    DATASETS.VAL_FRACTION                 share of the images of each of DATASETS.TRAIN that is kept from training and
                                          validated on (some of each class); 0 keeps none
    DATASETS.VAL_SEED                     chooses these images, the same whatever the SEED
    TEST.SELECT                           the weights that are evaluated on DATASETS.TEST, once: those of the last step,
                                          or best: those with the highest mAP on the validation split
    DATALOADER.CACHE_IMAGES_MB            decoded images are kept in memory if all of a set fit in this many MB
    ====================================  ==========================================================================
    """
    # a config of Detectron2 merges files only into nodes of its own class
    kind = type(cfg)
    cfg.ENGINE = "auto"
    cfg.TRUST_PICKLE = False
    cfg.TENSORBOARD = False
    cfg.WANDB = ""
    cfg.METHOD = "ce"
    cfg.TEACHER = kind()
    cfg.TEACHER.CONFIG_FILE = cfg.TEACHER.WEIGHTS = ""
    cfg.TRANSFER = _as_kind(detector_transfer_node(), kind)
    cfg.MODEL.TIMM = kind()
    cfg.MODEL.TIMM.ARCH = "resnet18"
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.TIMM.KWARGS = kind(new_allowed=True)
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE = 224
    cfg.MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL = 4
    cfg.SOLVER.AMP.DTYPE = "auto"
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.ACCUMULATE = 1
    cfg.SOLVER.EMA_DECAY = 0.0
    cfg.SOLVER.NON_FINITE = _as_kind(non_finite_node(), kind)
    cfg.DATASETS.VOC = kind(new_allowed=True)
    cfg.DATASETS.CLASSES = []
    cfg.DATASETS.USE_DIFFICULT = False
    cfg.DATASETS.VAL_FRACTION = 0.0
    cfg.DATASETS.VAL_SEED = 0
    cfg.TEST.SELECT = "last"
    cfg.DATALOADER.CACHE_IMAGES_MB = 1024


def detector_transfer_node() -> CfgNode:
    """Return the ``TRANSFER`` keys of stage two: those of both stages, and its own temperature."""
    node = transfer_node()
    node.OPTIONS.kd = CfgNode({"temperature": 1.0})
    return node


def _as_kind(node: CfgNode, kind: type[CfgNode]) -> CfgNode:
    copy = kind(new_allowed=node.is_new_allowed())
    for key, value in node.items():
        copy[key] = _as_kind(value, kind) if isinstance(value, CfgNode) else value
    return copy


def get_defaults() -> CfgNode:
    """Return the torchvision engine's keys with their defaults, which are Detectron2's."""
    cfg = CfgNode(DEFAULTS)
    add_nst_det_config(cfg)
    return cfg


def load_detect_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return the torchvision engine's config of a YAML file and ``KEY VALUE`` pairs, checked and frozen."""
    source = str(file or "command line")
    if file is not None:
        _refuse_detectron2_only(_tree_keys(read_yaml(file)), source)
    _refuse_detectron2_only((key for key, _ in key_values(overrides)), "command line")
    config = load_config(get_defaults(), file, overrides)
    check_config(config, source)
    return config


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
    values = flat(config)
    for key, taken in TAKEN_VALUES.items():
        value = list(values[key]) if isinstance(values[key], tuple) else values[key]
        if value not in taken:
            raise UserError(
                f"{source}: the torchvision engine can't honor {key} {value!r}; set it to "
                f"{' or '.join(repr(item) for item in taken)}, or use ENGINE detectron2"
            )
    for key, least in AT_LEAST.items():
        if values[key] < least:
            raise UserError(f"{source}: {key} is {values[key]}; it must be at least {least}")
    _check_levels(config.MODEL, source)
    if len(config.MODEL.PIXEL_MEAN) != 3 or len(config.MODEL.PIXEL_STD) != 3 or min(config.MODEL.PIXEL_STD) <= 0:
        raise UserError(f"{source}: MODEL.PIXEL_MEAN and PIXEL_STD must be three numbers each, PIXEL_STD above 0")
    sizes = config.INPUT.MIN_SIZE_TRAIN
    if not sizes or (config.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2):
        raise UserError(f"{source}: INPUT.MIN_SIZE_TRAIN must be a list of sizes, and two of them to sample a range")
    check_added_keys(config, source)


def check_added_keys(config: CfgNode, source: str) -> None:
    """Refuse values of this project's keys that neither engine can follow."""
    select, decay = config.TEST.SELECT, config.SOLVER.EMA_DECAY
    if select not in (LAST, BEST):
        raise UserError(f"{source}: TEST.SELECT '{select}' is not one of {LAST}, {BEST}")
    if select == BEST and not (config.DATASETS.VAL_FRACTION and config.TEST.EVAL_PERIOD):
        raise UserError(
            f"{source}: TEST.SELECT best needs a validation split to choose by, and when to look at it; set "
            "DATASETS.VAL_FRACTION (such as 0.2) and TEST.EVAL_PERIOD, or SELECT last"
        )
    if not 0 <= decay < 1:
        raise UserError(
            f"{source}: SOLVER.EMA_DECAY is {decay}; set it to 0 for no average, or to a fraction below 1 such as 0.999"
        )
    if decay and config.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            f"{source}: SOLVER.EMA_DECAY {decay}: TEST.PRECISE_BN measures the statistics of the weights in training, "
            "not of their average; set TEST.PRECISE_BN.ENABLED False, or SOLVER.EMA_DECAY 0"
        )
    if config.SOLVER.AMP.DTYPE not in ("auto", "bf16"):
        raise UserError(
            f"{source}: SOLVER.AMP.DTYPE '{config.SOLVER.AMP.DTYPE}' is not auto or bf16; a detector is trained "
            "without the loss scale that fp16 needs"
        )
    check_wandb(config.WANDB, source)
    check_non_finite(config.SOLVER.NON_FINITE, "SOLVER.NON_FINITE", source)


def _check_levels(model: CfgNode, source: str) -> None:
    levels = set(model.TIMM.OUT_FEATURES)
    readers = {
        "MODEL.RPN.IN_FEATURES": model.RPN.IN_FEATURES,
        "MODEL.ROI_HEADS.IN_FEATURES": model.ROI_HEADS.IN_FEATURES,
    }
    if model.BACKBONE.NAME == "build_timm_fpn_backbone":
        if not model.FPN.IN_FEATURES:
            raise UserError(f"{source}: MODEL.FPN.IN_FEATURES is empty; set it to [res2, res3, res4, res5]")
        _check_known(model.FPN.IN_FEATURES, levels, "MODEL.FPN.IN_FEATURES", source)
        numbers = [int(name[3:]) for name in model.FPN.IN_FEATURES]
        levels = {f"p{number}" for number in [*numbers, max(numbers) + 1]}
    for key, names in readers.items():
        _check_known(names, levels, key, source)
    for key in ("SIZES", "ASPECT_RATIOS"):
        rows = model.ANCHOR_GENERATOR[key]
        if not rows or not all(isinstance(row, list | tuple) and row for row in rows):
            raise UserError(f"{source}: MODEL.ANCHOR_GENERATOR.{key} must be a list of lists, like [[32], [64]]")
        if len(rows) not in (1, len(model.RPN.IN_FEATURES)):
            raise UserError(
                f"{source}: MODEL.ANCHOR_GENERATOR.{key} has {len(rows)} lists for {len(model.RPN.IN_FEATURES)} levels "
                "of MODEL.RPN.IN_FEATURES; give one, or one a level"
            )


def _check_known(names: Sequence[str], known: set[str], key: str, source: str) -> None:
    there_are = f"there are {', '.join(sorted(known))}"
    for name in names:
        if name not in known:
            raise UserError(f"{source}: {key}: no level '{name}'; {there_are}")
    if not names:
        raise UserError(f"{source}: {key} is empty; {there_are}")


def engine_is_installed() -> bool:
    """Return whether Detectron2 is installed; nothing is imported."""
    return importlib.util.find_spec("detectron2") is not None


def choose_engine(wanted: str, source: str = "command line") -> str:
    """Return ``detectron2`` or ``torchvision``; auto takes Detectron2 where it is installed, and says so."""
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


def voc_roots(config: CfgNode, names: Sequence[str], key: str) -> list[tuple[Path, str]]:
    """Return (root, split) of each data set that ``key`` names; it must be an entry of DATASETS.VOC."""
    roots = []
    for name in names:
        entry = config.DATASETS.VOC.get(name)
        if entry is None:
            known = ", ".join(config.DATASETS.VOC) or "nothing"
            raise UserError(f"{key}: no data set '{name}' in DATASETS.VOC, which has {known}")
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
    here = default_device().type
    if name.startswith("cuda") and here == "cpu":
        log.warning("MODEL.DEVICE %s: no GPU here, taking the CPU", name)
        return here
    return here if name == "auto" else name


def resolve_machine(config: CfgNode) -> None:
    """Set MODEL.DEVICE and DATALOADER.NUM_WORKERS to what they are on this machine, for either engine."""
    with defrosted(config):
        config.MODEL.DEVICE = resolve_device(config.MODEL.DEVICE)
        config.DATALOADER.NUM_WORKERS = loader_workers(config.DATALOADER.NUM_WORKERS, config.MODEL.DEVICE == "cpu")
