"""Stage two by the torchvision engine: one run of a config, from its folder to its result."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from fvcore.common.config import CfgNode

from nst_det.data.splits import JoinedVoc
from nst_det.data.voc import VocDataset
from nst_det.detection.box_head import check_class_names, reads_box_head
from nst_det.detection.checkpoint import (
    keep_best,
    load_weights,
    patience_is_over,
    save_weights,
    saved_classes,
    settle,
)
from nst_det.detection.config import (
    check_device,
    check_one_test_set,
    defrosted,
    listed_classes,
    load_detect_config,
    resolve_classes,
    resolve_device,
    resolve_machine,
)
from nst_det.detection.data import (
    check_tested_classes,
    data_classes,
    evaluation_batches,
    open_voc,
    split_training,
    training_batches,
    warn_of_shared,
)
from nst_det.detection.distiller import DistilledDetector, distill, level_channels, wants_teacher
from nst_det.detection.fingerprint import input_fingerprints
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detection.torchvision.backbone import compile_backbone
from nst_det.detection.trainer import Trainer, train
from nst_det.engine.checkpoint import checkpoints, would_resume
from nst_det.engine.compilation import check_compile
from nst_det.engine.config import expand_path
from nst_det.engine.device import (
    amp_dtype,
    cast_frozen,
    compute_line,
    gpu_errors_in_one_line,
    many_sizes,
    set_cudnn_benchmark,
    set_float32_precision,
    train_depthwise_in_float32,
)
from nst_det.engine.distributed import (
    broadcast_from_rank0,
    copy_from_first,
    gathered,
    is_main_process,
    rank,
    start_processes,
    started_together,
    world_size,
)
from nst_det.engine.format import text_table
from nst_det.engine.io import read_json, write_json
from nst_det.engine.keys import OFF
from nst_det.engine.metrics import last_losses
from nst_det.engine.progress import progress, waiting
from nst_det.engine.run_dir import WEIGHTS_FILE, RunFolder
from nst_det.engine.seeds import derive_seed, seeded
from nst_det.engine.train_state import AveragedWeights
from nst_det.errors import UserError
from nst_det.evaluation.boxes import Detections, GroundTruth
from nst_det.evaluation.io import write_detections
from nst_det.evaluation.metrics import summarize
from nst_det.evaluation.thresholds import THRESHOLDS
from nst_det.losses import parse_method
from nst_det.models import count_parameters
from nst_det.models.io import trusting_pickles

# image id, boxes (N, 4), labels (N,), scores (N,)
Image = tuple[str, np.ndarray, np.ndarray, np.ndarray]
log = logging.getLogger(__name__)
DETECTIONS_FILE = "detections.json"


@torch.no_grad()
@many_sizes()
def detect(detector: Detector, batches: Iterable[list[dict[str, Any]]], data: VocDataset | JoinedVoc) -> Detections:
    """Return the detections on all images of a split, the best of each first; the detector is left in evaluation mode.

    Of several processes each has the batches of its share (see :func:`share_of_batches`); all get all detections.
    """
    detector.eval()
    mine: list[Image] = []
    with progress("evaluation", len(data) // world_size()) as meter:
        for batch in batches:
            for item, found in zip(batch, detector(batch)):
                boxes, labels, scores = (found[name].cpu().numpy() for name in ("boxes", "labels", "scores"))
                mine.append((item["image_id"], boxes, labels, scores))
                meter.step()
    by_id = {image[0]: image for images in gathered(mine) for image in images}
    return Detections.from_images([by_id[item.id] for item in data.annotations()], data.classes)


def share_of_batches() -> slice:
    """Return the evaluation batches of this process: one in as many as there are processes."""
    return slice(rank(), None, world_size())


def score(found: Detections, data: VocDataset | JoinedVoc, validation: bool = False) -> dict[str, Any]:
    """Return what ``result.json`` holds of a detector, see :func:`~nst_det.evaluation.metrics.summarize`."""
    return summarize(found, GroundTruth.from_annotations(data.annotations(), data.classes), validation=validation)[1]


def train_detector(config: CfgNode) -> dict[str, Any]:
    """Train a detector in OUTPUT_DIR and evaluate it, or resume where a former call stopped; nothing is done twice.

    The folder then holds ``model.safetensors`` (the student alone), ``detections.json`` and ``result.json``, which is
    returned.  With DATASETS.VAL or VAL_FRACTION, evaluations during training are made on the validation split, not on
    DATASETS.TEST; ``model_best.safetensors`` are the weights that did best there.  DATASETS.TEST is evaluated once,
    with the weights that TEST.SELECT names; they are those in ``model.safetensors``.
    """
    folder = RunFolder(config.OUTPUT_DIR)
    smaller = "raise SOLVER.ACCUMULATE or lower SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN, in another OUTPUT_DIR"
    with gpu_errors_in_one_line(smaller, lambda: would_resume([checkpoints(folder.checkpoints)])):
        return _train_and_test(config, folder)


def _train_and_test(config: CfgNode, folder: RunFolder) -> dict[str, Any]:
    _begin(config)
    check_compile(config.SOLVER.COMPILE, torch.device(config.MODEL.DEVICE))
    with waiting("loading data"):
        classes = data_classes(config)
    resolve_classes(config, classes)
    with folder.opened(config, input_fingerprints(config, classes)) if is_main_process() else nullcontext():
        if broadcast_from_rank0(lambda: folder.done):
            log.info("%s is done already", folder.path)
            return broadcast_from_rank0(folder.result)
        seed = broadcast_from_rank0(lambda: _seed(config, folder))
        data = _test_data(config, classes)
        opened = open_voc(config, "DATASETS.TRAIN", classes)
        if data is not None and is_main_process():
            warn_of_shared(opened, [data])
        sets, validation = split_training(config, opened)
        # what VAL_FRACTION keeps has no name, and no other classes
        for part, tested in {"VAL": validation.sets if validation else (), "TEST": [data] if data else ()}.items():
            for name, one in zip(config.DATASETS[part], tested):
                check_tested_classes(one, f"DATASETS.{part} {name}")
        student = _student(config, classes, seed)
        average = AveragedWeights(student, config.SOLVER.EMA_DECAY) if config.SOLVER.EMA_DECAY else None
        model = _with_teacher(student, config, seed, classes)
        _compile(model, config.SOLVER.COMPILE)
        # what is evaluated and written
        kept = student if average is None else cast(Detector, average.network)

        def evaluate(step: int) -> dict[str, float]:
            found = _evaluate(kept, config, validation or data, validation=validation is not None)
            if validation is not None and is_main_process():
                keep_best(folder.path, kept, classes, step, found)
            prefix = "" if validation is None else "val/"
            return {f"{prefix}{name}": found[name] for name in ("map", "map_area") if found.get(name) is not None}

        def batches_from(step: int) -> Iterable[list[dict[str, Any]]]:
            return training_batches(config, sets, seed, step)

        def is_over(step: int) -> bool:
            return broadcast_from_rank0(lambda: patience_is_over(folder.path, step, config.TEST))

        trainer = Trainer(model, config, seed, folder, batches_from, average)
        train(trainer, folder, evaluate, is_over)
        validated: dict[str, Any] = {}
        if validation is not None:
            found = _evaluate(kept, config, validation, validation=True)

            def settled() -> dict[str, Any]:
                last = keep_best(folder.path, kept, classes, trainer.max_iter, found)
                return settle(folder.path, kept, last, config.TEST.SELECT)

            figures = {key: value for key, value in found.items() if key != THRESHOLDS}
            validated = {"validation": figures, **broadcast_from_rank0(settled)}
            # those of the best step, where they are tested
            copy_from_first(kept)
        if is_main_process():
            save_weights(folder.path / WEIGHTS_FILE, kept, classes)
        result = {
            **_evaluate(kept, config, data, folder.path / DETECTIONS_FILE),
            "seconds": trainer.state.seconds,
            "steps": trainer.max_iter,
            "engine": "torchvision",
            "params": count_parameters(student),
            "seed": seed,
            "method": parse_method(config.METHOD).word,
            "weights": dict(model.transfer.weights) if isinstance(model, DistilledDetector) else {},
            **validated,
        }
        if is_main_process():
            folder.finish(result | {"losses": last_losses(folder.metrics_path)})
        return broadcast_from_rank0(folder.result)


def evaluate_detector(config: CfgNode, resume: bool = False) -> dict[str, Any]:
    """Evaluate the detector of MODEL.WEIGHTS, or with ``resume`` of OUTPUT_DIR, on DATASETS.TEST.

    The numbers go to ``OUTPUT_DIR/inference``.
    """
    _begin(config)
    if resume:
        with defrosted(config):
            config.MODEL.WEIGHTS = str(Path(config.OUTPUT_DIR) / WEIGHTS_FILE)
    if not config.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name the data set to evaluate on")
    classes = _saved_classes(config) or data_classes(config)
    resolve_classes(config, classes)
    detector = build_detector(config)
    if load_weights(detector, config, classes) != "detector":
        raise UserError(
            f"MODEL.WEIGHTS {config.MODEL.WEIGHTS or 'is empty'}: --eval-only needs a whole detector; name its "
            f"{WEIGHTS_FILE}, or add --resume to take the one in {config.OUTPUT_DIR}"
        )
    folder = Path(config.OUTPUT_DIR) / "inference"
    with gpu_errors_in_one_line("lower INPUT.MIN_SIZE_TEST"):
        place_detector(detector, config)
        log.info(compute_line(detector.pixel_mean.device, detector.test_amp, config.DATALOADER.NUM_WORKERS))
        found = _evaluate(detector, config, _test_data(config, classes), folder / DETECTIONS_FILE)
    if is_main_process():
        write_json(folder / "result.json", found)
    return found


def _begin(config: CfgNode) -> None:
    with defrosted(config):
        config.ENGINE = "torchvision"
    resolve_machine(config)
    check_device(config, started_together())
    start_processes(config.MODEL.DEVICE == "cpu")


def _seed(config: CfgNode, folder: RunFolder) -> int:
    """Return SEED, or where it is negative one drawn by chance and kept in the folder, for the run to resume with."""
    path = folder.path / "seed.json"
    if config.SEED < 0 and not path.exists():
        write_json(path, derive_seed(os.urandom(16).hex()) % 2**31)
    return int(read_json(path) if config.SEED < 0 else config.SEED)


def _student(config: CfgNode, classes: Sequence[str], seed: int) -> Detector:
    detector = build_detector(config, seed)
    load_weights(detector, config, classes, starts=True)
    detector.freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)
    place_detector(detector, config)
    amp, device = config.SOLVER.AMP, detector.pixel_mean.device
    detector.amp = amp_dtype(amp, device)
    train_depthwise_in_float32(detector.backbone)
    set_cudnn_benchmark(config.CUDNN_BENCHMARK, device)
    log.info(compute_line(device, detector.amp, config.DATALOADER.NUM_WORKERS, amp.ENABLED))
    return detector


def place_detector(detector: Detector, config: CfgNode) -> None:
    """Move a detector to MODEL.DEVICE, in the layout and precision that its config asks for."""
    device = torch.device(resolve_device(config.MODEL.DEVICE))
    set_float32_precision(config.FLOAT32_PRECISION, device)
    detector.to(device)
    detector.test_amp = amp_dtype(config.SOLVER.AMP, device) if config.TEST.AMP else None
    # a layout in which convolutions are faster; the heads work on flat rows
    detector.backbone.to(memory_format=torch.channels_last)


def _with_teacher(
    student: Detector, config: CfgNode, seed: int, classes: Sequence[str]
) -> Detector | DistilledDetector:
    if not wants_teacher(config):
        return student
    with seeded(seed, "init", "teacher"), trusting_pickles(config.TRUST_PICKLE):
        teacher, filled, theirs = teacher_of(config)
    with seeded(seed, "init", "transfer"):
        model = distill(student, teacher, config.METHOD, config.TRANSFER)
    below = set(level_channels(teacher.backbone.bottom_up))
    read = [*model.transfer.teacher_levels, *(["box head"] if reads_box_head(model.transfer.method) else [])]
    if filled != "detector" and not (filled in ("backbone", "timm") and set(read) <= below):
        raise UserError(
            f"TEACHER.WEIGHTS: the teacher's {', '.join(read)} would be random; "
            f"name the {WEIGHTS_FILE} of a trained detector"
        )
    check_class_names(model.transfer, classes, theirs)
    model.to(student.pixel_mean.device)
    # of the teacher's backbone alone: its box head computes in float32
    cast_frozen(teacher.backbone, student.amp)
    return model


def _compile(model: Detector | DistilledDetector, mode: str) -> None:
    student = cast(Detector, model.student) if isinstance(model, DistilledDetector) else model
    device = student.pixel_mean.device
    # evaluated images have many sizes
    student.eager = mode == OFF
    compile_backbone(student.backbone, mode, device, "the student's", lambda: student.training)
    if isinstance(model, DistilledDetector):
        compile_backbone(cast(Detector, model.teacher).backbone, mode, device, "the teacher's")


def teacher_of(config: CfgNode) -> tuple[Detector, str, Sequence[str]]:
    """Return the teacher of TEACHER, what its weights filled (see ``load_weights``), and its classes."""
    named = config.TEACHER
    overrides = ["MODEL.WEIGHTS", named.WEIGHTS] if named.WEIGHTS else []
    own = load_detect_config(expand_path(named.CONFIG_FILE, "TEACHER.CONFIG_FILE"), overrides)
    classes = _saved_classes(own) or data_classes(own)
    # the names of a teacher's classes needn't be known
    if classes or not own.MODEL.ROI_HEADS.NUM_CLASSES:
        resolve_classes(own, classes)
    teacher = build_detector(own)
    filled = load_weights(teacher, own, key="TEACHER.WEIGHTS")
    place_detector(teacher, config)
    return teacher, filled, classes


def _saved_classes(config: CfgNode) -> list[str]:
    """Return DATASETS.CLASSES, or those in the weights file, or []."""
    weights = config.MODEL.WEIGHTS
    if config.DATASETS.CLASSES or not weights or "://" in weights:
        return list(listed_classes(config))
    path = Path(expand_path(weights, "MODEL.WEIGHTS"))
    return saved_classes(path) if path.is_file() else []


def _test_data(config: CfgNode, classes: Sequence[str]) -> VocDataset | None:
    check_one_test_set(config, "DATASETS.TEST")
    return open_voc(config, "DATASETS.TEST", classes)[0] if config.DATASETS.TEST else None


def _evaluate(
    detector: Detector,
    config: CfgNode,
    data: VocDataset | JoinedVoc | None,
    detections_file: Path | None = None,
    validation: bool = False,
) -> dict[str, Any]:
    """Return the detector's figures, {} without test data."""
    if data is None:
        return {}
    found = detect(detector, evaluation_batches(config, data, share=share_of_batches()), data)
    if detections_file is not None and is_main_process():
        write_detections(detections_file, found)
    return broadcast_from_rank0(lambda: score(found, data, validation))


def print_result(result: Mapping[str, Any], folder: str) -> None:
    """Print the AP of each class and the means in ``result.json`` of a folder."""
    if "map" not in result:
        print(f"trained; no VOC figures (DATASETS.TEST is empty, or not of DATASETS.VOC); see {folder}")
        return
    rows = [(name, ap, result["per_class_area"][name]) for name, ap in result["per_class"].items()]
    rows.append(("mean", result["map"], result["map_area"]))
    lines = [(name, _cell(by_points), _cell(by_area)) for name, by_points, by_area in rows]
    print(f"VOC AP at IoU 0.5, {folder}\n{text_table(('class', 'AP 11-point', 'AP area'), lines)}")
    print("COCO:", ", ".join(f"{name} {_cell(value)}" for name, value in result["coco"].items()))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
