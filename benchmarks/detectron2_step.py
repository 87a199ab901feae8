"""What a training step costs: Detectron2's own trainer, ours without transfer, ours with NST on p2..p5.

The steps of the three trainers are taken in turn, so that whatever else the machine does falls on all of them.

    python benchmarks/detectron2_step.py --voc-root ROOT [--config-file X] [--student A] [--teacher B] [--steps 60]

With one thread the time is the process's own CPU time, which other load on the machine hardly changes.  It prints the
median of each, and exits with 1 if ours without transfer takes more than 2 % longer than Detectron2's, or NST costs
more than the teacher's forward pass and 5 % of the step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nst_det.engine.device import keep_freed_memory

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "detect" / "voc" / "base_fpn.yaml"
WARM_UP = 3


def build(kind: type, cfg, storage_at: int = 0):
    from detectron2.utils.events import EventStorage

    trainer = kind(cfg)
    trainer.resume_or_load(resume=False)
    trainer.iter = trainer.start_iter = 0
    trainer.storage = EventStorage(storage_at)
    return trainer


def step(trainer, clock) -> float:
    """Seconds of one step, hooks included."""
    with trainer.storage:
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
            *("DATALOADER.CACHE_IMAGES_MB", "0", "MODEL.TIMM.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),
        ]
        teacher_opts = [*shared, "MODEL.TIMM.ARCH", args.teacher, "OUTPUT_DIR", f"{folder}/teacher"]
        teacher_cfg = load_config(args.config_file, teacher_opts)
        register_datasets(teacher_cfg)
        torch.save({"model": build_model(teacher_cfg).state_dict()}, f"{folder}/teacher.pth")
        (Path(folder) / "teacher.yaml").write_text(teacher_cfg.dump())

        def cfg(name: str, *opts: str):
            made = load_config(
                args.config_file, [*shared, "MODEL.TIMM.ARCH", args.student, "OUTPUT_DIR", f"{folder}/{name}", *opts]
            )
            register_datasets(made)
            return made

        nst = ["METHOD", "nst-poly", "TRANSFER.LEVELS", "['p2','p3','p4','p5']"]
        nst += ["TEACHER.CONFIG_FILE", f"{folder}/teacher.yaml"]
        nst += ["TEACHER.WEIGHTS", f"{folder}/teacher.pth"]

        class Plain(DefaultTrainer):
            """Detectron2's trainer as it is; only its evaluation is switched off."""

        trainers = {
            "detectron2": build(Plain, cfg("plain")),
            "ours, ce": build(DistillTrainer, cfg("ce")),
            "ours, nst-poly": build(DistillTrainer, cfg("nst", *nst)),
        }
        for trainer in trainers.values():
            for hook in trainer._hooks:
                hook.before_train()
        distilled = trainers["ours, nst-poly"].model
        teacher_seconds: list[float] = []
        forward = distilled._teacher_forward

        def timed(pixels):
            start = clock()
            maps = forward(pixels)
            teacher_seconds.append(clock() - start)
            return maps

        distilled._teacher_forward = timed
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for index in range(args.steps + WARM_UP):
            # begin with another one each time
            order = list(trainers.items())
            for name, trainer in order[index % 3 :] + order[: index % 3]:
                taken = step(trainer, clock)
                if index >= WARM_UP:
                    seconds[name].append(taken)

    width = teacher_cfg.MODEL.FPN.OUT_CHANNELS
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    teacher = 1000 * statistics.median(teacher_seconds[WARM_UP:])
    base = medians["detectron2"]
    # differences of steps taken in the same round, so that load on the machine cancels
    off = statistics.median(b / a for a, b in zip(seconds["detectron2"], seconds["ours, ce"])) - 1
    extra = 1000 * statistics.median(b - a for a, b in zip(seconds["ours, ce"], seconds["ours, nst-poly"]))
    loss = (extra - teacher) / base
    print(
        f"{args.student} from {args.teacher}, {args.batch} images of {args.image_size} pixels, FPN of {width} channels"
    )
    print(f"median of {args.steps} steps, {args.threads} thread(s), torch {torch.__version__}")
    for name, value in medians.items():
        print(f"  {name:16s} {value:8.1f} ms")
    print(f"  teacher forward  {teacher:8.1f} ms")
    print(f"ours without transfer: {100 * off:+.1f} % (limit 2 %)")
    print(f"NST beyond the teacher's forward: {100 * loss:+.1f} % of the step (limit 5 %)")
    return int(off > 0.02 or loss > 0.05)


if __name__ == "__main__":
    sys.exit(main())
