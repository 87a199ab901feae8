"""Detectron2's config with this project's keys, read as strictly as every other config of this project."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from fvcore.common.config import CfgNode as FvcoreNode

from nst_det.data.voc import VocDataset
from nst_det.detection.config import (
    add_nst_det_config,
    check_average,
    check_select,
    resolve_classes,
    resolve_machine,
    voc_roots,
)
from nst_det.detection.data import data_classes, split_training
from nst_det.detectron2 import modeling as backbone  # noqa: F401 (they fill Detectron2's registries)
from nst_det.detectron2.data import register_images, register_voc
from nst_det.detectron2.modeling import choose_roi_heads
from nst_det.engine import config as runtime
from nst_det.engine.metrics import check_wandb
from nst_det.engine.nan_guard import check_non_finite
from nst_det.errors import UserError

log = logging.getLogger(__name__)
# the name of the images that DATASETS.VAL_FRACTION keeps from training
VALIDATION = "validation"


def add_config(cfg: CfgNode) -> None:
    """Add this project's keys to Detectron2's ``get_cfg()``; backbones and heads are in the registries from then on."""
    add_nst_det_config(cfg)
    # its trainer always has
    cfg.TENSORBOARD = True
    _as_detectron2_nodes(cfg)


def _as_detectron2_nodes(node: CfgNode) -> None:
    # ``merge_from_file`` merges nodes of one class only, and the class adds nothing to the values
    for key, value in list(node.items()):
        if isinstance(value, FvcoreNode):
            own = CfgNode(new_allowed=value.is_new_allowed())
            for name, item in value.items():
                own[name] = item
            _as_detectron2_nodes(own)
            node[key] = own


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Detectron2's config from a YAML file (with ``_BASE_``) and ``KEY VALUE`` pairs, frozen.

    ``MODEL.DEVICE`` and ``DATALOADER.NUM_WORKERS`` become what they are on this machine, and the RoI heads those that
    read the canonical keys where these differ from Detectron2's constants.

    Raises:
        UserError: no such file, an unknown key, or a value of the wrong type.
    """
    defaults = get_cfg()
    add_config(defaults)
    cfg = runtime.load_config(defaults, file, overrides)
    cfg.defrost()
    resolve_machine(cfg)
    choose_roi_heads(cfg)
    cfg.freeze()
    if cfg.SOLVER.ACCUMULATE != 1:
        raise UserError(
            f"{file or 'command line'}: SOLVER.ACCUMULATE: Detectron2's trainer doesn't take a step's images in parts; "
            "set it to 1, or ENGINE torchvision"
        )
    check_select(cfg, str(file or "command line"))
    check_average(cfg, str(file or "command line"))
    check_wandb(cfg.WANDB, str(file or "command line"))
    check_non_finite(cfg.SOLVER.NON_FINITE, "SOLVER.NON_FINITE", str(file or "command line"))
    return cfg


def register_datasets(cfg: CfgNode) -> None:
    """Register the folders of ``DATASETS.VOC`` that TRAIN and TEST name, and set NUM_CLASSES where it is 0.

    All of them get the same classes: ``DATASETS.CLASSES``, or those in the annotations of the training sets.  Names
    that aren't in ``DATASETS.VOC`` must be known to Detectron2.  With ``DATASETS.VAL_FRACTION``, the training sets
    are registered without the images that are kept to validate on, and these as :data:`VALIDATION`.

    Raises:
        UserError: a data set that nobody knows, a bad folder, or a number of classes that isn't the data's.
    """
    names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
    ours = [name for name in names if name in cfg.DATASETS.VOC]
    for name in names:
        if name not in ours and name not in DatasetCatalog:
            raise UserError(f"DATASETS: no data set '{name}'; add DATASETS.VOC.{name} with ROOT and SPLIT")
    if not ours:
        return
    roots = dict(zip(ours, voc_roots(cfg, ours, "DATASETS")))
    classes = data_classes(cfg, known_only=True)
    opened = {}
    for name in ours:
        root, split = roots[name]
        opened[name] = register_voc(name, str(root), split, classes, cfg.DATASETS.USE_DIFFICULT)
        log.info("%s: %s of %s, classes %s", name, split, root, ", ".join(MetadataCatalog.get(name).thing_classes))
    if cfg.DATASETS.VAL_FRACTION:
        _register_validation(cfg, opened)
    resolve_classes(cfg, classes)


def _register_validation(cfg: CfgNode, opened: Mapping[str, VocDataset]) -> None:
    unknown = [name for name in cfg.DATASETS.TRAIN if name not in opened]
    both = [name for name in cfg.DATASETS.TRAIN if name in cfg.DATASETS.TEST]
    if unknown or both:
        raise UserError(
            f"DATASETS.VAL_FRACTION: {(unknown or both)[0]} is "
            f"{'no entry of DATASETS.VOC' if unknown else 'in DATASETS.TEST too'}, so it can't be cut; set it to 0"
        )
    names = list(cfg.DATASETS.TRAIN)
    left, validation = split_training(cfg, [opened[name] for name in names])
    for name, data in zip(names, left):
        register_images(name, data, cfg.DATASETS.USE_DIFFICULT)
    if validation is not None:
        register_images(VALIDATION, validation)


def validation_config(cfg: CfgNode) -> CfgNode | None:
    """A config that evaluates on the validation split, into ``OUTPUT_DIR/validation``; None where there is none."""
    if not cfg.DATASETS.VAL_FRACTION:
        return None
    own = cfg.clone()
    own.defrost()
    own.DATASETS.TEST = (VALIDATION,)
    own.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / VALIDATION)
    own.freeze()
    return own


def class_list(cfg: CfgNode) -> list[str]:
    """The classes that the data sets of a config are registered with; [] where they have none."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        return list(MetadataCatalog.get(name).get("thing_classes", []))
    return []
