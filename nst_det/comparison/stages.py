"""What the comparison knows of the two stages: their configs, and the keys that it sets for a single run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.engine.config import expand_path, load_config
from nst_det.errors import UserError

PIXEL_VALUES = 255.0


@dataclass(frozen=True)
class Stage:
    """A stage as the comparison sees it.

    Attributes:
        prefix: of its keys in the comparison's config.
        title: what errors call it.
        run_keys: keys that the comparison sets for every run.
        load: ``load(file, engine)`` reads a whole config.
        check: ``check(config, engine)`` refuses values that the stage itself would refuse.
    """

    prefix: str
    title: str
    run_keys: tuple[str, ...]
    load: Callable[[Path, str], CfgNode]
    check: Callable[[CfgNode, str], None]


def _load_distill(file: Path, _engine: str) -> CfgNode:
    from nst_det.distillation.config import get_defaults

    return load_config(get_defaults(), file)


def _check_distill(config: CfgNode, _engine: str) -> None:
    from nst_det.distillation.config import check_config

    check_config(config)


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


DISTILL = Stage(
    "DISTILL", "stage one", ("NAME", "OUTPUT_DIR", "REGISTRY", "SEED", "METHODS"), _load_distill, _check_distill
)
DETECT = Stage("DETECT", "stage two", ("OUTPUT_DIR", "SEED", "ENGINE", "MODEL.WEIGHTS"), _load_detect, _check_detect)
STAGES = (DISTILL, DETECT)


@contextmanager
def errors_of(source: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Put ``source`` before the line of an error, in place of what the stage calls its own input."""
    try:
        yield
    except kind as error:
        line = str(error)
        for own in ("command line: ", "config: ", "generate-data: "):
            line = line.removeprefix(own)
        raise UserError(f"{source}: {line}") from error


def resolve_engine(wanted: str, detect_file: Path, source: str) -> str:
    """Return the detector engine: the comparison's ENGINE, or where that is auto, the one of stage two's file."""
    from nst_det.detection.config import choose_engine, wanted_engine

    if wanted == "auto":
        return choose_engine(wanted_engine(detect_file, ()), str(detect_file))
    return choose_engine(wanted, source)


def check_hand_over(distill: CfgNode, detect: CfgNode, source: str) -> None:
    """Refuse two stages that don't fit: other architecture, or pixels of another scale or channel order."""
    from nst_det.models.card import Card, check_input_contract, input_contract

    data, model = distill.DATA, detect.MODEL
    student = (distill.STUDENT.ARCH, dict(distill.STUDENT.ARCH_KWARGS))
    bottom_up = (model.TIMM.ARCH, dict(model.TIMM.KWARGS))
    if "timm" in model.BACKBONE.NAME and student != bottom_up:
        one, two = (f"{arch} {kwargs}" if kwargs else arch for arch, kwargs in (student, bottom_up))
        raise UserError(
            f"{source}: stage one trains {one} (DISTILL.STUDENT.ARCH), stage two expects {two} "
            "(DETECT.MODEL.TIMM.ARCH); set one to the other"
        )
    card = Card(student[0], 1, input=input_contract(data.MEAN, data.STD, "RGB", data.IMAGE_SIZE))
    mean, std = ([value / PIXEL_VALUES for value in values] for values in (model.PIXEL_MEAN, model.PIXEL_STD))
    keys = "DETECT.MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT don't fit DISTILL.DATA.MEAN and STD (divided by 255)"
    with errors_of(f"{source}: {keys}"):
        check_input_contract(card, mean, std, detect.INPUT.FORMAT)


def check_distill_losses(distill: CfgNode, methods: Iterable[str], source: str) -> None:
    """Build what stage one will build, so that hours of a teacher's training don't end in a wrong level or term."""
    from nst_det.distillation.build import build_losses, initial_student, initial_teacher
    from nst_det.distillation.pipeline import parse_methods

    config = distill.clone()
    config.defrost()
    # published weights are not fetched to look at shapes; a random network of the architecture has the same
    config.TEACHER.TRAIN = config.TEACHER.TRAIN or config.TEACHER.PRETRAINED
    config.STUDENT.PRETRAINED = config.TEACHER.PRETRAINED = False
    with errors_of(f"{source}: DISTILL"):
        teacher = initial_teacher(config, ["0", "1"])
        student = initial_student(config, teacher.num_classes)
        build_losses(config, parse_methods(list(methods)), student, teacher, labels_shared=True)


def check_detector_losses(student: CfgNode, teacher: CfgNode | None, source: str) -> None:
    """Build what a row with terms of stage two will build; a teacher of the user's own (None) is left to its run."""
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

    with errors_of(f"{source}: DETECT"):
        distill(bare(student), bare(teacher), student.METHOD, student.TRANSFER)


def check_data_folders(distill: CfgNode, detect: CfgNode, source: str) -> None:
    """Look whether the folders of both stages are there, before the first of them takes its hours."""
    folders = {"DISTILL.DATA.ROOT": distill.DATA.ROOT}
    for name in (*detect.DATASETS.TRAIN, *detect.DATASETS.TEST):
        # Detectron2 may know other names by itself
        if name in detect.DATASETS.VOC:
            folders[f"DETECT.DATASETS.VOC.{name}.ROOT"] = detect.DATASETS.VOC[name].get("ROOT", "")
    for key, folder in folders.items():
        if not folder or not Path(expand_path(str(folder), key)).is_dir():
            raise UserError(f"{source}: {key}: no folder '{folder}'; name it on the command line: {key} DIR")


def check_generated(generate: dict[str, Any], root: Path, source: str) -> None:
    """Refuse settings of the generated data that can't be used, or that differ from what is in ``root`` already."""
    from nst_det.data.synthetic import SETTINGS_FILE, generate_data, settings_from

    with errors_of(f"{source}: DATA.GENERATE"):
        settings = settings_from(generate)
    if (root / SETTINGS_FILE).exists():
        generate_data(root, settings)


def generated_settings(stage: Stage, config: CfgNode, root: Path | None) -> dict[str, Any]:
    """Return the keys by which a stage reads the generated data set under ``root``; none without one."""
    if root is None:
        return {}
    from nst_det.data.synthetic import CLASSIFICATION, DETECTION

    if stage is DISTILL:
        return {"DATA.ROOT": str(root / CLASSIFICATION)}
    names = dict.fromkeys([*config.DATASETS.TRAIN, *config.DATASETS.TEST])
    return {f"DATASETS.VOC.{name}.ROOT": str(root / DETECTION) for name in names if name in config.DATASETS.VOC}
