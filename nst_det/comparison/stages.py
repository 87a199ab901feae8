"""What the comparison knows of the two stages: their configs, and the keys that it sets for a single run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.engine.config import expand_path, load_config, read_yaml
from nst_det.errors import UserError

PIXEL_VALUES = 255.0


@dataclass(frozen=True)
class Stage:
    """A stage as the comparison sees it.

    Attributes:
        prefix: of its keys in the comparison's config (``DISTILL`` or ``DETECT``).
        title: what errors call it.
        run_keys: keys that the comparison sets for every run.
    """

    prefix: str
    title: str
    run_keys: tuple[str, ...]

    def load(self, file: Path, engine: str) -> CfgNode:
        """Its whole config as a file gives it.

        Raises:
            UserError: the file can't be read, or has a key that this stage (on this engine) doesn't know.
        """
        if self.prefix == "DETECT":
            return _load_detect(file, engine)
        from nst_det.distillation.config import get_defaults

        return load_config(get_defaults(), file)

    def check(self, config: CfgNode, engine: str, source: str) -> None:
        """Refuse the config of one run before anything is started, where the stage itself would refuse it.

        Raises:
            UserError: the line names the key.
        """
        try:
            if self.prefix == "DETECT":
                _check_detect(config, engine)
            else:
                from nst_det.distillation.config import check_config

                check_config(config)
        except UserError as error:
            raise UserError(f"{source}: {self.title}: {str(error).removeprefix('config: ')}") from error


DISTILL = Stage("DISTILL", "stage one", ("NAME", "OUTPUT_DIR", "REGISTRY", "SEED", "METHODS"))
DETECT = Stage("DETECT", "stage two", ("OUTPUT_DIR", "SEED", "ENGINE", "MODEL.WEIGHTS"))
STAGES = (DISTILL, DETECT)


def resolve_engine(wanted: str, detect_file: Path, source: str) -> str:
    """The detector engine: the comparison's ENGINE, or where that is auto, the one of stage two's file.

    Raises:
        UserError: an unknown engine, or one that is not installed.
    """
    from nst_det.detection.config import choose_engine, wanted_engine

    if wanted == "auto":
        read_yaml(detect_file)
        return choose_engine(wanted_engine(detect_file, ()), str(detect_file))
    return choose_engine(wanted, source)


def _load_detect(file: Path, engine: str) -> CfgNode:
    if engine == "torchvision":
        from nst_det.detection.config import load_detect_config

        return load_detect_config(file)
    from detectron2.config import get_cfg

    from nst_det.detectron2.config import add_config

    defaults = get_cfg()
    add_config(defaults)
    return load_config(defaults, file)


def _check_detect(config: CfgNode, engine: str) -> None:
    # Detectron2 takes all its own keys and values; what it can't use it says when it builds
    if engine == "torchvision":
        from nst_det.detection.config import check_config

        check_config(config, "config")


def check_hand_over(distill: CfgNode, detect: CfgNode, source: str) -> None:
    """Refuse two stages that don't fit: other architecture, or pixels of another scale or channel order.

    Raises:
        UserError: one line with both sides.
    """
    from nst_det.models.card import Card, check_input_contract, input_contract

    data, model = distill.DATA, detect.MODEL
    student = (distill.STUDENT.ARCH, dict(distill.STUDENT.ARCH_KWARGS))
    bottom_up = (model.TIMM.ARCH, dict(model.TIMM.KWARGS))
    if "timm" in model.BACKBONE.NAME and student != bottom_up:
        raise UserError(
            f"{source}: stage one trains {_arch_text(*student)} (DISTILL.STUDENT.ARCH), stage two expects "
            f"{_arch_text(*bottom_up)} (DETECT.MODEL.TIMM.ARCH); set one to the other"
        )
    card = Card(student[0], 1, input=input_contract(data.MEAN, data.STD, "RGB", data.IMAGE_SIZE))
    mean, std = ([value / PIXEL_VALUES for value in values] for values in (model.PIXEL_MEAN, model.PIXEL_STD))
    try:
        check_input_contract(card, mean, std, detect.INPUT.FORMAT)
    except UserError as error:
        raise UserError(
            f"{source}: DETECT.MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT don't fit DISTILL.DATA.MEAN and STD "
            f"(divided by 255): {error}"
        ) from error


def check_transfer(distill: CfgNode, methods: Sequence[str], source: str) -> None:
    """Build what stage one will build, so that hours of a teacher's training don't end in a wrong level or term.

    Raises:
        UserError: networks, weights of the teacher, or the transfer terms of a method can't be had.
    """
    from nst_det.distillation.build import build_losses, initial_student, initial_teacher
    from nst_det.distillation.pipeline import parse_methods

    config = distill.clone()
    config.defrost()
    # published weights are not fetched to look at shapes; a random network of the architecture has the same
    config.TEACHER.TRAIN = config.TEACHER.TRAIN or config.TEACHER.PRETRAINED
    config.STUDENT.PRETRAINED = config.TEACHER.PRETRAINED = False
    try:
        teacher = initial_teacher(config, ["0", "1"])
        student = initial_student(config, teacher.num_classes)
        build_losses(config, parse_methods(methods), student, teacher, labels_shared=True)
    except UserError as error:
        raise UserError(f"{source}: DISTILL: {str(error).removeprefix('config: ')}") from error


def check_detector_transfer(student: CfgNode, teacher: CfgNode | None, source: str) -> None:
    """Build what a row with terms of stage two will build, for the same reason.

    Args:
        student: the whole config of that row's detector.
        teacher: that of the detector it learns from; None for the user's own, which is looked at when it is loaded.
        source: named in errors.

    Raises:
        UserError: the terms can't be built from these two detectors.
    """
    if teacher is None or student.ENGINE != "torchvision":
        return
    from nst_det.detection.distiller import distill
    from nst_det.detection.torchvision import Detector, build_detector

    def bare(config: CfgNode) -> Detector:
        config = config.clone()
        config.defrost()
        config.MODEL.WEIGHTS, config.MODEL.TIMM.PRETRAINED = "", False
        # the heads' width plays no part, and the data may not be there yet
        config.MODEL.ROI_HEADS.NUM_CLASSES = config.MODEL.ROI_HEADS.NUM_CLASSES or 1
        return build_detector(config)

    try:
        distill(bare(student), bare(teacher), student.TRANSFER)
    except UserError as error:
        raise UserError(f"{source}: DETECT: {error}") from error


def check_data_folders(distill: CfgNode, detect: CfgNode, source: str) -> None:
    """Look whether the folders of both stages are there, before the first of them takes its hours.

    Raises:
        UserError: one is not; the line names its key.
    """
    folders = {"DISTILL.DATA.ROOT": distill.DATA.ROOT}
    for name in (*detect.DATASETS.TRAIN, *detect.DATASETS.TEST):
        # Detectron2 may know other names by itself
        if name in detect.DATASETS.VOC:
            folders[f"DETECT.DATASETS.VOC.{name}.ROOT"] = detect.DATASETS.VOC[name].get("ROOT", "")
    for key, folder in folders.items():
        if not folder or not Path(expand_path(str(folder), key)).is_dir():
            raise UserError(f"{source}: {key}: no folder '{folder}'; name it on the command line: {key} DIR")


def _arch_text(arch: str, kwargs: dict[str, Any]) -> str:
    return f"{arch} {kwargs}" if kwargs else arch


def total_steps(kind: str, config: CfgNode) -> int:
    """Optimizer steps of a run of a kind."""
    if kind == "teacher":
        from nst_det.distillation.config import teacher_solver

        return int(teacher_solver(config).MAX_ITER)
    return int(config.SOLVER.MAX_ITER)


def check_generated(generate: dict[str, Any], root: Path, source: str) -> None:
    """Refuse settings of the generated data set that can't be used, or that differ from what is in ``root`` already.

    Raises:
        UserError: the line names the setting.
    """
    from nst_det.data.synthetic import SETTINGS_FILE, generate_data, settings_from

    try:
        settings = settings_from(generate)
    except UserError as error:
        raise UserError(f"{source}: DATA.GENERATE: {str(error).removeprefix('generate-data: ')}") from error
    if (root / SETTINGS_FILE).exists():
        generate_data(root, settings)


def generated_settings(stage: Stage, config: CfgNode, root: Path | None) -> dict[str, Any]:
    """The keys by which a stage reads the generated data set under ``root``; none without one."""
    if root is None:
        return {}
    from nst_det.data.synthetic import CLASSIFICATION, DETECTION

    if stage is DISTILL:
        return {"DATA.ROOT": str(root / CLASSIFICATION)}
    names = dict.fromkeys([*config.DATASETS.TRAIN, *config.DATASETS.TEST])
    return {f"DATASETS.VOC.{name}.ROOT": str(root / DETECTION) for name in names if name in config.DATASETS.VOC}
