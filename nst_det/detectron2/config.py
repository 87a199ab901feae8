"""Detectron2's config with this project's keys, read as strictly as every other config of this project."""

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

import nst_det.detectron2.checkpoint  # noqa: F401 (its handler of backbone://)
from nst_det.data.splits import JoinedVoc
from nst_det.data.voc import VocDataset
from nst_det.detection.config import (
    add_nst_det_config,
    check_added_keys,
    defrosted,
    load_with_preset,
    resolve_classes,
    resolve_machine,
    set_names,
    validates,
)
from nst_det.detection.data import open_sets, split_training, warn_of_shared
from nst_det.detectron2.data import register_images
from nst_det.detectron2.modeling import roi_heads
from nst_det.engine.config import flat
from nst_det.engine.distributed import is_main_process
from nst_det.engine.keys import OFF
from nst_det.errors import UserError

log = logging.getLogger(__name__)
# what DATASETS.VAL or VAL_FRACTION says to validate on, in Detectron2's catalog; no data set of a user's has this name
VALIDATION = "DATASETS.VAL"


def add_config(cfg: CfgNode) -> None:
    """Add this project's keys to Detectron2's ``get_cfg()``; backbones and heads are in the registries from then on."""
    add_nst_det_config(cfg)
    # its trainer always has
    cfg.TENSORBOARD = True


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return Detectron2's config of a YAML file (with ``_BASE_``) and ``KEY VALUE`` pairs, frozen."""
    defaults = get_cfg()
    add_config(defaults)
    cfg = load_with_preset(defaults, file, overrides)
    check_config(cfg, str(file or "command line"))
    with defrosted(cfg):
        resolve_machine(cfg)
        cfg.MODEL.ROI_HEADS.NAME = roi_heads(cfg)
    return cfg


def check_config(cfg: CfgNode, source: str) -> None:
    """Refuse values that this engine can't follow; Detectron2 takes all of its own, and complains when it builds."""
    if cfg.SOLVER.ACCUMULATE != 1:
        raise UserError(
            f"{source}: SOLVER.ACCUMULATE: Detectron2's trainer doesn't take a step in parts; set it to 1, or ENGINE "
            "torchvision"
        )
    if cfg.SOLVER.COMPILE != OFF or cfg.INPUT.PADDED_SIZES:
        raise UserError(
            f"{source}: SOLVER.COMPILE and INPUT.PADDED_SIZES: Detectron2 pads a batch to its largest image, "
            'which makes too many sizes to compile; set them to "off" and [], or ENGINE torchvision'
        )
    check_added_keys(cfg, source)
    roi_heads(cfg)


def check_sync_norm(cfg: CfgNode, processes: int) -> None:
    """Refuse normalization over several processes on the CPU, where PyTorch doesn't train by it."""
    for key, value in flat(cfg.MODEL, "MODEL.").items() if processes > 1 and cfg.MODEL.DEVICE == "cpu" else ():
        if key.endswith(".NORM") and value in ("SyncBN", "nnSyncBN"):
            raise UserError(
                f"{key} {value}: Detectron2 doesn't train by it in several processes on the CPU; set it to BN, or "
                "start one process"
            )


def check_set_names(cfg: CfgNode) -> None:
    """Refuse names that neither DATASETS.VOC nor Detectron2 knows, and those that can't be validated on."""
    ours = cfg.DATASETS.VOC
    for name in set_names(cfg):
        if name not in ours and name not in DatasetCatalog:
            raise UserError(f"DATASETS: no data set '{name}'; add DATASETS.VOC.{name} with ROOT and SPLIT")
    if validates(cfg):
        for name in cfg.DATASETS.TRAIN:
            key = "VAL" if cfg.DATASETS.VAL else "VAL_FRACTION"
            if name not in ours or (key == "VAL_FRACTION" and name in cfg.DATASETS.TEST):
                why = "in DATASETS.TEST too" if name in ours else "no entry of DATASETS.VOC"
                raise UserError(f"DATASETS.{key}: {name} of DATASETS.TRAIN is {why}; leave DATASETS.{key} out")


def open_datasets(cfg: CfgNode) -> dict[str, VocDataset]:
    """Open the folders of ``DATASETS.VOC`` that TRAIN, VAL and TEST name, after a look at all names."""
    check_set_names(cfg)
    return open_sets(cfg)


def register_datasets(cfg: CfgNode) -> None:
    """Register the folders of ``DATASETS.VOC`` that TRAIN and TEST name, and set NUM_CLASSES where it is 0."""
    opened = open_datasets(cfg)
    if not opened:
        return
    for name, data in opened.items():
        log.info("%s: %s of %s, classes %s", name, data.split, data.root, ", ".join(data.classes))
    if is_main_process():
        train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
        learned, tested = ([opened[name] for name in part if name in opened] for part in (train, test))
        warn_of_shared(learned, tested)
    sets: dict[str, VocDataset | JoinedVoc] = dict(opened)
    if validates(cfg):
        left, validation = split_training(cfg, [opened[name] for name in cfg.DATASETS.TRAIN])
        sets |= dict(zip(cfg.DATASETS.TRAIN, left))
        if validation is not None:
            sets[VALIDATION] = validation
    for name, images in sets.items():
        register_images(name, images, cfg.DATASETS.USE_DIFFICULT)
    resolve_classes(cfg, next(iter(opened.values())).classes)


def validation_config(cfg: CfgNode) -> CfgNode | None:
    """Return a config that evaluates the validation split, into ``OUTPUT_DIR/validation``; None where there is none."""
    if not validates(cfg):
        return None
    own = cfg.clone()
    with defrosted(own):
        own.DATASETS.TEST = (VALIDATION,)
        own.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / "validation")
    return own


def class_list(cfg: CfgNode) -> list[str]:
    """Return the classes that the data sets of a config are registered with; [] where they have none."""
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return list(MetadataCatalog.get(names[0]).get("thing_classes", [])) if names else []
