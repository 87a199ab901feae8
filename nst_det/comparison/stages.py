"""The two stages as a comparison sees them: their configs, and what can be checked before a run starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

import nst_det.detection.config as detection_config
import nst_det.distillation.config as distillation_config
from nst_det.data.synthetic import CLASSIFICATION, DETECTION, SETTINGS_FILE, generate_data, settings_from
from nst_det.detection.augment import change_preset
from nst_det.detection.fingerprint import input_fingerprints
from nst_det.engine.config import expand_path, load_config, merge_overrides
from nst_det.engine.io import sha256_of_file
from nst_det.errors import UserError
from nst_det.models import resolve
from nst_det.models.card import Card, check_input_contract, input_contract

# classes of data that aren't there yet, or whose own don't matter
UNKNOWN = ("?",)
# prefixes of the stages' keys in a comparison's config
DISTILL, DETECT = "DISTILL", "DETECT"
TITLES = {DISTILL: "stage one", DETECT: "stage two"}


def load_stage(stage: str, file: Path, engine: str) -> CfgNode:
    if stage == DISTILL:
        return load_config(distillation_config.get_defaults(), file)
    if engine == "torchvision":
        return detection_config.load_detect_config(file)
    from detectron2.config import get_cfg

    from nst_det.detectron2.config import add_config

    defaults = get_cfg()
    add_config(defaults)
    return detection_config.load_with_preset(defaults, file, ())


def check_stage(stage: str, config: CfgNode, engine: str) -> None:
    """Refuse values that the stage itself would refuse."""
    if stage == DISTILL:
        distillation_config.check_config(config)
    elif engine == "torchvision":
        detection_config.check_config(config, "config")
    else:
        from nst_det.detectron2.config import check_config

        check_config(config, "config")


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


def merge_stage(config: CfgNode, words: Sequence[str], source: str) -> CfgNode:
    """Return a copy of a stage's config with KEY VALUE pairs on top; ``source`` is named in errors."""
    merged = config.clone()
    merged.defrost()
    with errors_of(source):
        change_preset(merged, list(zip(words[::2], words[1::2])))
        merge_overrides(merged, words)
    merged.freeze()
    return merged


def check_stages_fit(distill: CfgNode, detect: CfgNode, source: str) -> None:
    """Refuse two stages with different architectures, or pixels of another scale or channel order."""
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
    mean, std = ([value / 255.0 for value in values] for values in (model.PIXEL_MEAN, model.PIXEL_STD))
    keys = "DETECT.MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT don't fit DISTILL.DATA.MEAN and STD (divided by 255)"
    with errors_of(f"{source}: {keys}"):
        check_input_contract(card, mean, std, detect.INPUT.FORMAT)


def check_distill_losses(distill: CfgNode, methods: Iterable[str], source: str) -> None:
    """Build what stage one will build, so that a wrong level or term is found before the teacher is trained."""
    from nst_det.distillation.build import build_losses, initial_student, initial_teacher
    from nst_det.distillation.pipeline import parse_methods
    from nst_det.models.build import published_file

    config = distill.clone()
    config.defrost()
    for part in ("TEACHER", "STUDENT"):
        try:
            # a run would miss it much later
            if config[part].PRETRAINED and not config[part].WEIGHTS:
                published_file(config[part].ARCH)
        except ValueError as error:
            raise UserError(f"{source}: DISTILL.{part}.PRETRAINED: {error}") from error
    # published weights aren't read to look at shapes; a random network of the architecture has the same
    config.TEACHER.TRAIN = config.TEACHER.TRAIN or config.TEACHER.PRETRAINED
    config.STUDENT.PRETRAINED = config.TEACHER.PRETRAINED = False
    with errors_of(f"{source}: DISTILL"):
        teacher = initial_teacher(config, None)
        student = initial_student(config, teacher.num_classes or len(UNKNOWN))
        shared = config.DATA.LABELS or teacher.num_classes > 0
        build_losses(config, parse_methods(list(methods)), student, teacher, labels_shared=shared)


def check_detector_losses(student: CfgNode, teacher: CfgNode, source: str) -> None:
    """Build the detectors and losses of a row that learns from a teacher detector."""
    from nst_det.detection.distiller import distill
    from nst_det.detection.torchvision import Detector, build_detector

    def bare(config: CfgNode) -> Detector:
        config = _bare(config)
        # the heads' width plays no part, and the data may not be there yet
        config.MODEL.ROI_HEADS.NUM_CLASSES = config.MODEL.ROI_HEADS.NUM_CLASSES or 1
        return build_detector(config)

    with errors_of(f"{source}: DETECT"):
        distill(bare(student), bare(teacher), student.METHOD, student.TRANSFER)


def check_backbones(configs: Iterable[CfgNode], source: str) -> None:
    """Build each backbone of stage two once, so that one that suits no detector is found before stage one."""
    from nst_det.detection.torchvision.backbone import build_backbone

    bare = [_bare(config) for config in configs]
    with errors_of(f"{source}: DETECT"):
        for config in {
            str((config.MODEL.TIMM, config.MODEL.BACKBONE, config.MODEL.FPN)): config for config in bare
        }.values():
            build_backbone(config, 0)


def check_classifier(config: CfgNode, source: str) -> None:
    """Refuse a detector's weights where a row is to begin with a classifier's, as all others do."""
    from nst_det.models.io import is_backbone_file, read_any, trusting_pickles
    from nst_det.models.weights import are_of_detector

    path = resolve(expand_path(config.MODEL.WEIGHTS, "MODEL.WEIGHTS"))
    # what isn't there is told by whoever loads it
    if not path.is_file() or is_backbone_file(path):
        return
    with errors_of(source), trusting_pickles(config.TRUST_PICKLE):
        if are_of_detector(read_any(path)):
            raise UserError(
                f"MODEL.WEIGHTS {path}: a whole detector, whose heads the other rows have to learn; name a "
                "classifier's weights in DETECT.IMAGENET_OPTS [MODEL.WEIGHTS, FILE], or take the row coco, or leave "
                "the row out"
            )


def check_published(config: CfgNode, source: str) -> None:
    """Fill a detector with the weights that a row begins with, which are there before anything is trained."""
    from nst_det.detection.checkpoint import load_weights
    from nst_det.detection.torchvision import build_detector

    config = config.clone()
    config.defrost()
    # the data, and with them the classes, may not be there yet
    config.MODEL.ROI_HEADS.NUM_CLASSES, config.MODEL.KEEP_CLASSES = config.MODEL.ROI_HEADS.NUM_CLASSES or 1, False
    with errors_of(source):
        load_weights(build_detector(config), config, starts=True)


def _bare(config: CfgNode) -> CfgNode:
    """Return the config of a detector with random weights."""
    config = config.clone()
    config.defrost()
    config.MODEL.WEIGHTS, config.MODEL.TIMM.PRETRAINED = "", False
    return config


def check_data_sets(detect: CfgNode, engine: str, source: str) -> None:
    """Refuse names of data sets with which the detectors of a comparison would fail, some after their training."""
    if not detect:
        return
    for part in ("TRAIN", "VAL", "TEST"):
        named, key = detect.DATASETS[part], f"{source}: DETECT.DATASETS.{part}"
        if not named and part != "VAL":
            raise UserError(f"{key} names no data set; name one of DATASETS.VOC")
        # Detectron2 knows others, and tests on several
        if engine == "torchvision":
            detection_config.check_known(detect, named, key)
    if engine == "torchvision":
        detection_config.check_one_test_set(detect, f"{source}: DETECT.DATASETS.TEST")
        return
    from nst_det.detectron2.config import check_set_names

    with errors_of(f"{source}: DETECT"):
        check_set_names(detect)


def check_data_folders(distill: CfgNode, detect: CfgNode, engine: str, source: str) -> None:
    """Refuse data folders that aren't there, lists that aren't in them, and classes that the engine would refuse."""
    folders = [(f"{DISTILL}.{key}", root) for key, root in distillation_config.image_roots(distill)]
    if distill.TEST.PROBE.ROOT:
        folders.append((f"{DISTILL}.TEST.PROBE.ROOT", distill.TEST.PROBE.ROOT))
    # Detectron2 may know other names by itself
    sets = [name for name in detection_config.set_names(detect) if name in detect.DATASETS.VOC] if detect else []
    folders += [(f"{DETECT}.DATASETS.VOC.{name}.ROOT", detect.DATASETS.VOC[name].get("ROOT", "")) for name in sets]
    for key, folder in folders:
        path = Path(expand_path(str(folder), key))
        # the images of stage one may be in an archive
        if not folder or not (path.exists() if key.startswith(DISTILL) else path.is_dir()):
            raise UserError(f"{source}: {key}: no folder '{folder}'; name it on the command line: {key} DIR")
    with errors_of(f"{source}: DETECT"):
        if engine == "detectron2":
            from nst_det.detectron2.config import open_datasets

            open_datasets(detect)
        elif detect:
            from nst_det.detection.data import open_sets

            open_sets(detect)


def data_fingerprints(distill: CfgNode, detect: CfgNode) -> dict[str, str]:
    """Return the fingerprints, by key, of data and weights that both stages name by a path."""
    # torch takes seconds to import
    from nst_det.distillation.dataloader import read_data, read_probe

    own = input_fingerprints(detect) if detect else {}
    inputs = {f"{DETECT}.{key}": value for key, value in own.items()}
    inputs |= weight_fingerprints(distill)
    if probe := read_probe(distill):
        inputs[f"{DISTILL}.TEST.PROBE.FINGERPRINT"] = probe.fingerprint()
    return {f"{DISTILL}.DATA.FINGERPRINT": read_data(distill).fingerprint(), **inputs}


def weight_fingerprints(distill: CfgNode) -> dict[str, str]:
    """Return the fingerprints, by key, of the weights that stage one names by a path."""
    named = {part: expand_path(distill[part].WEIGHTS, f"{DISTILL}.{part}.WEIGHTS") for part in ("TEACHER", "STUDENT")}
    return {f"{DISTILL}.{part}.SHA256": sha256_of_file(resolve(weights)) for part, weights in named.items() if weights}


def check_generated(generate: dict[str, Any], root: Path, source: str) -> None:
    """Refuse settings of the generated data that can't be used, or that differ from what is in ``root`` already."""
    with errors_of(f"{source}: DATA.GENERATE"):
        settings = settings_from(generate)
    if (root / SETTINGS_FILE).exists():
        generate_data(root, settings)


def generated_settings(stage: str, config: CfgNode, root: Path | None) -> dict[str, Any]:
    """Return the keys by which a stage reads the generated data set under ``root``; none without one."""
    if root is None:
        return {}
    if stage == DISTILL:
        return {"DATA.ROOT": str(root / CLASSIFICATION)}
    names = [name for name in detection_config.set_names(config) if name in config.DATASETS.VOC]
    return {f"DATASETS.VOC.{name}.ROOT": str(root / DETECTION) for name in names}
