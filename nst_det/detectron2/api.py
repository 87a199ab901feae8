"""Three lines for somebody's own Detectron2 project."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from nst_det.detection import distiller
from nst_det.detection.box_head import check_class_names, reads_box_head
from nst_det.detection.checkpoint import saved_classes
from nst_det.detection.config import detector_transfer_node, listed_classes, resolve_device
from nst_det.detection.data import data_classes
from nst_det.detection.distiller import DistilledDetector
from nst_det.detectron2.checkpoint import PREFIX, SUFFIX, BackboneCheckpointer
from nst_det.detectron2.config import add_config, class_list
from nst_det.detectron2.modeling import TimmBackbone, bottom_up_of, box_outputs, roi_heads
from nst_det.engine.config import expand_path, placed
from nst_det.engine.seeds import seeded
from nst_det.errors import UserError
from nst_det.losses import parse_method
from nst_det.models.io import card_path, pickles_are_trusted, trusting_pickles

log = logging.getLogger(__name__)


def build_teacher(
    config_file: str,
    weights: str = "",
    device: str | None = None,
    overrides: Sequence[str] = (),
    levels: Sequence[str] = (),
    box_head: bool = False,
) -> nn.Module:
    """Return a frozen detector in evaluation mode.

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
        raise UserError("TEACHER.CONFIG_FILE is empty; name the teacher's config, or set METHOD ce")
    path, of_zoo = _find(config_file)
    # the teacher's random numbers must not move the student's
    with seeded(0, "teacher"):
        model, named = _build_lazy(path) if path.endswith(".py") else _build_yaml(path, weights, device, overrides)
    # a config of the model zoo names the weights that its training began with, not those it ended with
    source = expand_path(weights, "TEACHER.WEIGHTS") or (
        _zoo_weights(config_file) if of_zoo else expand_path(named, "MODEL.WEIGHTS")
    )
    _, bottom_up = bottom_up_of(model)
    if not source and not (isinstance(bottom_up, TimmBackbone) and bottom_up.loaded):
        raise UserError(
            f"{config_file}: names no weights and TEACHER.WEIGHTS is empty; a random teacher teaches nothing"
        )
    of_backbone = source.startswith(PREFIX) or (source.endswith(SUFFIX) and card_path(source).is_file())
    if not source or of_backbone:
        _check_below_fpn(levels, source or f"{config_file} with timm's weights", box_head)
    BackboneCheckpointer(model, whole=bool(source) and not of_backbone).load(source)
    log.info("teacher: %s, weights %s", config_file, source or "timm's")
    if device is not None:
        model.to(device)
    return model.eval().requires_grad_(False)


def _check_below_fpn(levels: Sequence[str], source: str, box_head: bool) -> None:
    theirs = [str(level).rpartition(":")[2].strip() for level in levels]
    random = ["box head"] * box_head + [level for level in theirs if not level.startswith("res")]
    if random:
        raise UserError(
            f"TRANSFER: {source} is a backbone, so the teacher's {random[0]} would be random; compare res2 .. res5, or "
            "name the weights of a whole detector"
        )


def _find(config_file: str) -> tuple[str, bool]:
    """Return the config's path, and whether it is one of the model zoo's."""
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
            "TEACHER.WEIGHTS, or install setuptools<81"
        ) from error


def _read_yaml(path: str, overrides: Sequence[str]) -> CfgNode:
    cfg: CfgNode = get_cfg()
    add_config(cfg)
    try:
        # Detectron2's own reader: it also upgrades configs of earlier versions, and runs the Python code in a YAML,
        # of which there is some in its model zoo
        own = Path(path).is_relative_to(Path(detectron2.__file__).parent)
        cfg.merge_from_file(path, allow_unsafe=own or pickles_are_trusted())
        folder = Path(path).resolve().parent
        cfg.MODEL.WEIGHTS = placed(cfg.MODEL.WEIGHTS, folder)
        for entry in (one for one in cfg.DATASETS.VOC.values() if isinstance(one, dict)):
            entry.update(placed(dict(entry), folder))
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
    cfg.MODEL.ROI_HEADS.NAME = roi_heads(cfg)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        classes = _classes_in(weights or named) or data_classes(cfg, known_only=True)
        if not classes:
            raise UserError(f"{path}: MODEL.ROI_HEADS.NUM_CLASSES is 0, and no data set of DATASETS.VOC has classes")
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    return build_model(cfg), named


def _build_lazy(path: str) -> tuple[nn.Module, str]:
    cfg: Any = LazyConfig.load(path)
    if "model" not in cfg:
        raise UserError(f"{path}: a LazyConfig without 'model'")
    return instantiate(cfg.model), str(cfg.get("train", {}).get("init_checkpoint", ""))


def _classes_in(weights: str) -> list[str]:
    return saved_classes(weights) if weights and "://" not in weights and Path(weights).is_file() else []


def teacher_classes(config_file: str, weights: str = "") -> list[str]:
    """Return a teacher's classes, as its config, its weights or its data set have them; [] where none does."""
    path, _ = _find(config_file)
    if path.endswith(".py"):
        return []
    cfg = _read_yaml(path, ())
    saved = _classes_in(expand_path(weights or cfg.MODEL.WEIGHTS, "TEACHER.WEIGHTS"))
    return list(listed_classes(cfg)) or saved or class_list(cfg)


def distill(
    student: nn.Module,
    teacher: nn.Module | str,
    method: str = "nst-poly",
    levels: Sequence[str] = ("p2", "p3", "p4", "p5"),
    *,
    teacher_weights: str = "",
    weights: Mapping[str, float] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    auto_weight: Mapping[str, float] | None = None,
    warmup_iters: int = 0,
    seed: int = 0,
    trust_pickle: bool = False,
) -> DistilledDetector:
    """Make any Detectron2 detector learn from a teacher detector while it trains.

    The result trains, evaluates and is saved like ``student``: its losses get a ``loss_transfer_<term>`` a term, and
    its state dict is the student's, by the student's names.  Give its ``parameters()`` to the optimizer, since some
    terms have adapters; to keep these over a restart, add
    ``checkpointer.add_checkpointable("adapters", model.transfer)``.

    Args:
        student: the detector that is trained, from ``build_model(cfg)``, ``instantiate(cfg.model)`` or anywhere.
        teacher: a trained detector, or its config: a YAML, a Python LazyConfig, or a name in Detectron2's model zoo.
        method: such as ``nst-poly``, ``at+nst-poly`` or ``nst-poly:20``.
        levels: what is compared: names that the backbones give, ``student:teacher`` where they differ.
        teacher_weights: the teacher's checkpoint if ``teacher`` is a config; "" takes those that it names.
        weights: term to weight, where ``method`` has none.
        options: term to its options; those that it leaves out keep their default; ``kd`` has the temperature 1 here.
        auto_weight: term to the share of the gradient norm at the student's backbone, 1.0 as much as the student's own
            losses, that its weight is to give it; chosen in the first five steps, instead of ``weights``.
        warmup_iters: the weights rise linearly from 0 over that many steps.
        seed: of the adapters.
        trust_pickle: open the teacher's checkpoint also where it is a pickle with more than tensors in it (``.pkl``, as
            the model zoo has them), which can run any code.

    Raises:
        UserError: no such teacher, weights that don't fit it, or a method that these two can't be compared by.

    Example::

        class Trainer(DefaultTrainer):
            @classmethod
            def build_model(cls, cfg):
                return distill(super().build_model(cfg), "teacher.yaml", "nst-poly")
    """
    node = detector_transfer_node()
    node.LEVELS, node.WARMUP_ITERS = list(levels), warmup_iters
    for name, values in (("WEIGHTS", weights), ("OPTIONS", options), ("AUTO_WEIGHT", auto_weight)):
        for term, value in dict(values or {}).items():
            # as a YAML does, over what is the default
            node[name][term] = {**node[name].get(term, {}), **value} if isinstance(value, Mapping) else value
    if isinstance(teacher, str):
        teacher = _teacher_of(method, node, teacher, teacher_weights, _device(student), trust_pickle)
    return _wrap(student, teacher, method, node, seed)


def distill_from_config(student: nn.Module, cfg: CfgNode) -> nn.Module:
    """Wrap the student as a config's METHOD, TEACHER and TRANSFER say; return it as it is where METHOD is ``ce``."""
    if not distiller.wants_teacher(cfg):
        return student
    node, named, device = cfg.TRANSFER, cfg.TEACHER, _device(student)
    teacher = _teacher_of(cfg.METHOD, node, named.CONFIG_FILE, named.WEIGHTS, device, cfg.TRUST_PICKLE)
    model = _wrap(student, teacher, cfg.METHOD, node, max(cfg.SEED, 0))
    with trusting_pickles(cfg.TRUST_PICKLE):
        check_class_names(model.transfer, class_list(cfg), teacher_classes(named.CONFIG_FILE, named.WEIGHTS))
    return model


def _teacher_of(
    method: str, node: CfgNode, config_file: str, weights: str, device: torch.device, trust_pickle: bool
) -> nn.Module:
    levels = [*node.LEVELS, *(level for own in node.TERM_LEVELS.values() for level in own)]
    try:
        box_head = reads_box_head(parse_method(method))
    except ValueError as error:
        raise UserError(f"METHOD: {error}") from error
    with trusting_pickles(trust_pickle):
        return build_teacher(config_file, weights, str(device), levels=levels, box_head=box_head)


def _wrap(student: nn.Module, teacher: nn.Module, method: str, node: CfgNode, seed: int) -> DistilledDetector:
    with seeded(seed, "adapters"):
        model = distiller.distill(student, teacher, method, node, box_outputs)
    model.to(_device(student))
    model.register_forward_pre_hook(_follow_iteration)
    return model


def _follow_iteration(model: nn.Module, _: Any) -> None:
    # a run that resumes doesn't warm up again, whoever's trainer it is
    if model.training and has_event_storage():
        model.iteration = get_event_storage().iter


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def student_of(model: nn.Module) -> nn.Module:
    """Return the student in a :class:`DistilledDetector`; any other model itself."""
    return model.student if isinstance(model, DistilledDetector) else model
