"""The teacher detector: any Detectron2 config and its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from torch import nn

from nst_det.backbones.files import card_path
from nst_det.backbones.pickles import pickles_are_trusted
from nst_det.detect.config import resolve_device
from nst_det.detect.dataset import data_classes
from nst_det.detect.detectron2.backbone import TimmBackbone, bottom_up_of
from nst_det.detect.detectron2.checkpoint import PREFIX, SUFFIX, BackboneCheckpointer
from nst_det.detect.detectron2.config import add_config, class_list
from nst_det.detect.detectron2.heads import choose_roi_heads
from nst_det.detect.weights import saved_classes
from nst_det.errors import UserError
from nst_det.runtime.config import expand_path
from nst_det.runtime.seeds import seeded

log = logging.getLogger(__name__)


def build_teacher(
    config_file: str,
    weights: str = "",
    device: str | None = None,
    overrides: Sequence[str] = (),
    levels: Sequence[str] = (),
    box_head: bool = False,
) -> nn.Module:
    """A frozen detector in evaluation mode.

    Args:
        config_file: a YAML (this project's, or any of Detectron2's), a Python LazyConfig, or a name of Detectron2's
            model zoo such as ``COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml``.
        weights: a checkpoint, ``detectron2://...`` or an address; "" takes those that the config names, and for a
            config of the model zoo those that belong to it.
        device: where it computes; None takes the config's, or the CPU where that is not there.
        overrides: ``KEY VALUE`` pairs on top of a YAML config.
        levels: what will be compared; a backbone file, which has no FPN, can teach ``res2`` .. ``res5`` only.
        box_head: whether its box head will be asked too; a backbone file has none.

    Raises:
        UserError: no such config, no weights at all, or weights that leave a part of the detector random.
    """
    if not config_file:
        raise UserError("TRANSFER.TEACHER.CONFIG_FILE is empty; name the teacher's config, or set TRANSFER.METHOD ce")
    path, of_zoo = _find(config_file)
    # the teacher's random numbers must not move the student's
    with seeded(0, "teacher"):
        model, named = _build_lazy(path) if path.endswith(".py") else _build_yaml(path, weights, device, overrides)
    # a config of the model zoo names the weights that its training began with, not those it ended with
    source = expand_path(weights, "TRANSFER.TEACHER.WEIGHTS") or (_zoo_weights(config_file) if of_zoo else named)
    _, bottom_up = bottom_up_of(model)
    published = isinstance(bottom_up, TimmBackbone) and bottom_up.loaded
    if not source and not published:
        raise UserError(
            f"{config_file}: names no weights and TRANSFER.TEACHER.WEIGHTS is empty; a random teacher teaches nothing"
        )
    if not source or _is_backbone_file(source):
        _check_levels(levels, source or f"{config_file} with timm's weights", box_head)
        complete: list[str] = []
    else:
        complete = [name for name, _ in model.named_children()]
    BackboneCheckpointer(model, complete=complete).load(source)
    log.info("teacher: %s, weights %s", config_file, source or "timm's")
    if device is not None:
        model.to(device)
    return model.eval().requires_grad_(False)


def teacher_classes(config_file: str, weights: str = "") -> list[str]:
    """The names of a teacher's classes, as its config, its weights or its data set tell them; [] where none does.

    Raises:
        UserError: no such config, or not one.
    """
    path, _ = _find(config_file)
    if path.endswith(".py"):
        return []
    cfg = _read_yaml(path, ())
    local = expand_path(weights or cfg.MODEL.WEIGHTS, "TRANSFER.TEACHER.WEIGHTS")
    saved = saved_classes(local) if local and "://" not in local and Path(local).is_file() else []
    return list(cfg.DATASETS.CLASSES) or saved or class_list(cfg)


def _is_backbone_file(source: str) -> bool:
    return source.startswith(PREFIX) or (source.endswith(SUFFIX) and card_path(source).is_file())


def _check_levels(levels: Sequence[str], source: str, box_head: bool) -> None:
    if box_head:
        raise UserError(
            f"TRANSFER: {source} is a backbone, so the teacher's box head would be random; name the weights of a whole "
            "detector, or use terms on feature maps"
        )
    for level in levels:
        theirs = str(level).rpartition(":")[2].strip()
        if not theirs.startswith("res"):
            raise UserError(
                f"TRANSFER: {source} is a backbone, so the teacher's '{theirs}' would be random; compare res2 .. res5, "
                "or name the weights of a whole detector"
            )


def _find(config_file: str) -> tuple[str, bool]:
    """The config's path, and whether it is one of the model zoo's."""
    path = Path(config_file).expanduser()
    if path.is_file():
        return str(path), False
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    if not (zoo / config_file).is_file():
        raise UserError(f"{config_file}: no such config file, and no config of this name in Detectron2's model zoo")
    return str(zoo / config_file), True


def _zoo_weights(config_file: str) -> str:
    try:
        # Detectron2 0.6 reads its model zoo by pkg_resources, which setuptools 81 dropped
        from detectron2 import model_zoo

        return str(model_zoo.get_checkpoint_url(config_file))
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{config_file}: the model zoo's weights of it can't be found ({error}); name them by "
            "TRANSFER.TEACHER.WEIGHTS, or install setuptools<81"
        ) from error


def _read_yaml(path: str, overrides: Sequence[str]) -> CfgNode:
    cfg: CfgNode = get_cfg()
    add_config(cfg)
    try:
        # Detectron2's own reader: it also upgrades configs of earlier versions, and runs the Python code in a YAML,
        # of which there is some in its model zoo
        own = Path(path).is_relative_to(Path(detectron2.__file__).parent)
        cfg.merge_from_file(path, allow_unsafe=own or pickles_are_trusted())
        cfg.merge_from_list(list(overrides))
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path}: not read: a tag in it or its _BASE_ asks for Python code ({error.problem}); write the value out, "
            "or if you trust where it is from, add --trust-pickle (in a config: TRUST_PICKLE True)"
        ) from error
    except (KeyError, ValueError, AssertionError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a Detectron2 config: {error}") from error
    return cfg


def _build_yaml(path: str, weights: str, device: str | None, overrides: Sequence[str]) -> tuple[nn.Module, str]:
    cfg = _read_yaml(path, overrides)
    named = cfg.MODEL.WEIGHTS
    cfg.MODEL.DEVICE = device or resolve_device(cfg.MODEL.DEVICE)
    # the guard against frozen random layers is for those without weights; these come below
    cfg.MODEL.WEIGHTS = weights or named or "later"
    cfg.MODEL.TIMM.PRETRAINED = cfg.MODEL.TIMM.PRETRAINED and not (weights or named)
    choose_roi_heads(cfg)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = _classes(cfg, path, weights or named)
    model: nn.Module = build_model(cfg)
    return model, named


def _classes(cfg: CfgNode, path: str, weights: str) -> int:
    local = weights if weights and "://" not in weights and Path(weights).is_file() else ""
    classes = (saved_classes(local) if local else []) or data_classes(cfg, known_only=True)
    if not classes:
        raise UserError(f"{path}: MODEL.ROI_HEADS.NUM_CLASSES is 0, and no data set of DATASETS.VOC tells the number")
    return len(classes)


def _build_lazy(path: str) -> tuple[nn.Module, str]:
    cfg: Any = LazyConfig.load(path)
    if "model" not in cfg:
        raise UserError(f"{path}: a LazyConfig without 'model'")
    return instantiate(cfg.model), str(cfg.get("train", {}).get("init_checkpoint", ""))
