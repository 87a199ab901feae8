"""What a training step costs: Detectron2's own trainer, the torchvision engine, ours on Detectron2, and NST on p2..p5.

The steps of all trainers are taken in turn, so that whatever else the machine does falls on all of them.

    python benchmarks/detectron2_step.py --voc-root ROOT [--config-file X] [--student A] [--teacher B] [--steps 60]
        [--trainers torchvision ce nst]

With one thread the time is the process's own CPU time, which other load on the machine hardly changes.  It prints the
median of each, and exits with 1 if the torchvision engine takes more than 0.90 of Detectron2's own trainer, if ours on
Detectron2 without transfer takes more than 2 % longer than it, or if NST costs more than the teacher's forward pass and
5 % of the step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from nst_det.engine.device import keep_freed_memory

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "detect" / "voc" / "base_fpn.yaml"
WARM_UP = 3
PLAIN = "detectron2's own"
OURS = {"torchvision": "torchvision engine", "ce": "detectron2 engine, ce", "nst": "detectron2 engine, nst-poly"}


def build(kind: type, cfg, storage_at: int = 0):
    from detectron2.utils.events import EventStorage

    trainer = kind(cfg)
    trainer.resume_or_load(resume=False)
    trainer.iter = trainer.start_iter = 0
    trainer.storage = EventStorage(storage_at)
    return trainer


def build_ours(words: list[str], config_file: str, folder: Path) -> Any:
    """The torchvision engine's trainer on the same YAML."""
    from nst_det.detection.config import load_detect_config, resolve_classes
    from nst_det.detection.data import data_classes, open_voc, training_batches
    from nst_det.detection.pipeline import place_detector
    from nst_det.detection.torchvision import build_detector
    from nst_det.detection.trainer import Trainer
    from nst_det.engine.run_dir import RunFolder
    from nst_det.engine.trainer import MetricsHook

    config = load_detect_config(config_file, [*words, "ENGINE", "torchvision"])
    classes = data_classes(config)
    resolve_classes(config, classes)
    sets = open_voc(config, "DATASETS.TRAIN", classes)
    detector = build_detector(config)
    detector.freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)
    place_detector(detector, config)
    run = RunFolder(folder)
    trainer = Trainer(detector, config, 0, run, lambda start: training_batches(config, sets, 0, start))
    trainer.register_hooks([MetricsHook(run, False, {})])
    return trainer


def step(trainer, clock) -> float:
    """Seconds of one step, hooks included."""
    with getattr(trainer, "storage", nullcontext()):
        start = clock()
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()
        seconds = clock() - start
    trainer.iter += 1
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--voc-root", required=True, help="a VOC folder with a split 'trainval'")
    parser.add_argument("--config-file", default=str(CONFIG))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--image-size", type=int, default=480, help="short side in pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--trainers", nargs="+", choices=list(OURS), default=list(OURS), help="beside Detectron2's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as train-det does; it holds for all three
    clock = time.process_time if args.threads == 1 else time.perf_counter
    logging.disable(logging.INFO)

    from detectron2.engine import DefaultTrainer
    from detectron2.modeling import build_model

    from nst_det.detectron2.config import load_config, register_datasets
    from nst_det.detectron2.trainer import DistillTrainer

    with tempfile.TemporaryDirectory() as folder:
        shared = [
            *("DATASETS.VOC", str({"bench": {"ROOT": args.voc_root, "SPLIT": "trainval"}})),
            *("DATASETS.TRAIN", "['bench']", "DATASETS.TEST", "[]", "DATASETS.CLASSES", "[]"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "0", "MODEL.TIMM.PRETRAINED", "False", "MODEL.DEVICE", "cpu"),
            *("SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000", "DATALOADER.NUM_WORKERS", "0"),
            *("SOLVER.IMS_PER_BATCH", str(args.batch), "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.00001"),
            *("INPUT.MIN_SIZE_TRAIN", f"[{args.image_size}]", "INPUT.MAX_SIZE_TRAIN", str(2 * args.image_size)),
            # Detectron2's own loader keeps no images; random weights must not be frozen
            *("SOLVER.AMP.ENABLED", "False", "TENSORBOARD", "False", "DATALOADER.CACHE_IMAGES_MB", "0"),
            *("MODEL.TIMM.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),
        ]
        names = [OURS[name] for name in args.trainers]
        teacher_opts = [*shared, "MODEL.TIMM.ARCH", args.teacher, "OUTPUT_DIR", f"{folder}/teacher"]
        teacher_cfg = load_config(args.config_file, teacher_opts)
        register_datasets(teacher_cfg)
        torch.save({"model": build_model(teacher_cfg).state_dict()}, f"{folder}/teacher.pth")
        (Path(folder) / "teacher.yaml").write_text(teacher_cfg.dump())

        def words(name: str, *opts: str) -> list[str]:
            return [*shared, "MODEL.TIMM.ARCH", args.student, "OUTPUT_DIR", f"{folder}/{name}", *opts]

        def cfg(name: str, *opts: str):
            made = load_config(args.config_file, words(name, *opts))
            register_datasets(made)
            return made

        nst = ["METHOD", "nst-poly", "TRANSFER.LEVELS", "['p2','p3','p4','p5']"]
        nst += ["TEACHER.CONFIG_FILE", f"{folder}/teacher.yaml"]
        nst += ["TEACHER.WEIGHTS", f"{folder}/teacher.pth"]

        class Plain(DefaultTrainer):
            """Detectron2's trainer as it is; only its evaluation is switched off."""

        trainers = {PLAIN: build(Plain, cfg("plain"))}
        if OURS["torchvision"] in names:
            trainers[OURS["torchvision"]] = build_ours(words("ours"), args.config_file, Path(folder) / "ours")
        if OURS["ce"] in names:
            trainers[OURS["ce"]] = build(DistillTrainer, cfg("ce"))
        teacher_seconds: list[float] = []
        if OURS["nst"] in names:
            trainers[OURS["nst"]] = build(DistillTrainer, cfg("nst", *nst))
            backbone, begun = trainers[OURS["nst"]].distilled.teacher.backbone, []
            backbone.register_forward_pre_hook(lambda *_: begun.append(clock()))
            backbone.register_forward_hook(lambda *_: teacher_seconds.append(clock() - begun.pop()))
        for name, trainer in trainers.items():
            if name == OURS["torchvision"]:
                trainer.before_train()
            else:
                for hook in trainer._hooks:
                    hook.before_train()
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for index in range(args.steps + WARM_UP):
            # begin with another one each time
            order, first = list(trainers.items()), index % len(trainers)
            for name, trainer in order[first:] + order[:first]:
                taken = step(trainer, clock)
                if index >= WARM_UP:
                    seconds[name].append(taken)

    width = teacher_cfg.MODEL.FPN.OUT_CHANNELS
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    print(
        f"{args.student} from {args.teacher}, {args.batch} images of {args.image_size} pixels, FPN of {width} channels"
    )
    print(f"median of {args.steps} steps, {args.threads} thread(s), torch {torch.__version__}")
    for name, value in medians.items():
        print(f"  {name:28s} {value:8.1f} ms")
    within = True

    def ratio(name: str, limit: float) -> bool:
        # of steps taken in the same round, so that load on the machine cancels
        found = statistics.median(b / a for a, b in zip(seconds[PLAIN], seconds[name]))
        print(f"{name} / {PLAIN}: {found:.3f} (limit {limit:.2f})")
        return found <= limit

    for name, limit in ((OURS["torchvision"], 0.90), (OURS["ce"], 1.02)):
        if name in names:
            within &= ratio(name, limit)
    if {OURS["ce"], OURS["nst"]} <= set(names):
        teacher = 1000 * statistics.median(teacher_seconds[WARM_UP:])
        extra = 1000 * statistics.median(b - a for a, b in zip(seconds[OURS["ce"]], seconds[OURS["nst"]]))
        loss = (extra - teacher) / medians[PLAIN]
        print(f"teacher's forward pass: {teacher:.1f} ms")
        print(f"NST beyond it: {100 * loss:+.1f} % of the step (limit 5 %)")
        within &= loss <= 0.05
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
