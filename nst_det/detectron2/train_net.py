"""One training or evaluation run of a config by Detectron2, started with Detectron2's arguments."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from nst_det.detection.checkpoint import save_weights
from nst_det.detection.config import check_device
from nst_det.detection.data import data_classes
from nst_det.detection.fingerprint import input_fingerprints
from nst_det.detection.pipeline import DETECTIONS_FILE, print_result
from nst_det.detection.trainer import transfer_of
from nst_det.detectron2.checkpoint import BackboneCheckpointer, numbered, step_of
from nst_det.detectron2.config import (
    VALIDATION,
    check_sync_norm,
    class_list,
    load_config,
    register_datasets,
    validation_config,
)
from nst_det.detectron2.trainer import DistillTrainer, inference_folder, reduce_backbones
from nst_det.engine.checkpoint import would_resume
from nst_det.engine.device import (
    amp_dtype,
    compute_line,
    gpu_errors_in_one_line,
    keep_freed_memory,
    set_float32_precision,
)
from nst_det.engine.distributed import TIMEOUT, start_processes, started_together, stop_processes
from nst_det.engine.io import read_json, write_text
from nst_det.engine.metrics import last_losses
from nst_det.engine.run_dir import WEIGHTS_FILE, RunFolder, portable
from nst_det.engine.signals import EXIT_RESUME, Preempted, preemptible
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import THRESHOLDS
from nst_det.losses import parse_method
from nst_det.models import count_parameters
from nst_det.models.io import trusting_pickles

log = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> int:
    """Train or evaluate with Detectron2's arguments, in as many processes as asked, or as one of torchrun's; return 0.

    ``args`` are ``config_file``, ``resume``, ``eval_only``, ``num_gpus`` (processes a machine; on a machine without a
    GPU they share the CPU), ``num_machines``, ``machine_rank``, ``dist_url`` and ``opts`` (``KEY VALUE`` pairs).  A
    UserError or Preempted of any of the processes ends all.
    """
    # what can be wrong with the config is reported here, before any process is started
    cfg = load_config(args.config_file or None, args.opts or [])
    if args.num_gpus > 1 and torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")
    if cfg.SOLVER.IMS_PER_BATCH % max(args.num_gpus * args.num_machines, 1):
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} can't be shared out to the processes evenly")
    processes = max(started_together(), args.num_gpus * args.num_machines)
    check_device(cfg, processes)
    if not args.eval_only:
        check_sync_norm(cfg, processes)
    if started_together() > 1:
        if args.num_gpus > 1 or args.num_machines > 1:
            raise UserError("--num-gpus, --num-machines: torchrun has started the processes; leave these out")
        start_processes(cfg.MODEL.DEVICE == "cpu")
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        run(args)
        stop_processes()
    elif args.num_gpus * args.num_machines > 1:
        _launch(cfg, args)
    else:
        run(args)
    return 0


def _launch(cfg: CfgNode, args: argparse.Namespace) -> None:
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--num-machines: say where the machines meet by --dist-url, such as tcp://HOST:29500")
    if cfg.MODEL.DEVICE == "cpu" and torch.cuda.is_available():
        raise UserError(
            "--num-gpus, --num-machines: where there are GPUs Detectron2's processes meet by these, also with "
            "MODEL.DEVICE cpu; hide them by CUDA_VISIBLE_DEVICES='', or start the processes by torchrun"
        )
    where = {"num_machines": args.num_machines, "machine_rank": args.machine_rank, "dist_url": args.dist_url}
    try:
        launch(_run_and_exit, args.num_gpus, **where, args=(args,), timeout=TIMEOUT)
    except ProcessRaisedException as error:
        # the traceback of the process is all that is known of its error
        marker = f"{UserError.__module__}.{UserError.__name__}: "
        lines = [line for line in str(error).splitlines() if line.startswith(marker)]
        raise UserError(lines[-1].removeprefix(marker)) if lines else error from error
    except ProcessExitedException as error:
        if error.exit_code == EXIT_RESUME:
            raise Preempted(signal.SIGTERM) from error
        raise
    except Preempted:
        processes = multiprocessing.active_children()
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
        finally:
            # where a second signal came, which doesn't wait for the step
            for process in processes:
                process.kill()
        raise


def _run_and_exit(args: argparse.Namespace) -> None:
    """Run in a process of ``launch``, which learns of a signal by the exit code alone."""
    # Ctrl-C reaches the command's process group; the command passes it on, once
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    try:
        with preemptible():
            run(args)
    except Preempted:
        sys.exit(EXIT_RESUME)


def run(args: argparse.Namespace) -> None:
    """Train or evaluate in this process; the first one owns the run folder."""
    keep_freed_memory()
    cfg = load_config(args.config_file or None, args.opts or [])
    with trusting_pickles(cfg.TRUST_PICKLE):
        if args.eval_only:
            with gpu_errors_in_one_line("lower INPUT.MIN_SIZE_TEST"):
                evaluate(cfg, args)
            return
        folder = RunFolder(cfg.OUTPUT_DIR)
        smaller = "lower SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN, in another OUTPUT_DIR"
        with (
            gpu_errors_in_one_line(smaller, lambda: would_resume([numbered(folder.path)], step_of)),
            folder.opened(cfg, input_fingerprints(cfg, data_classes(cfg, known_only=True) or None))
            if comm.is_main_process()
            else nullcontext(),
        ):
            comm.synchronize()
            if folder.done:
                log.info("%s is done already", folder.path)
            else:
                _setup(cfg, cfg.OUTPUT_DIR, args)
                train(cfg, folder, args.resume)
            if comm.is_main_process():
                print_result(folder.result(), cfg.OUTPUT_DIR)


def _setup(cfg: CfgNode, output_dir: str | Path, args: argparse.Namespace) -> None:
    """Do Detectron2's setup, with its log and config in ``output_dir``; this project's log goes there too."""
    own = portable(cfg, Path(output_dir))
    own.OUTPUT_DIR = str(output_dir)
    default_setup(own, args)
    set_float32_precision(cfg.FLOAT32_PRECISION, torch.device(cfg.MODEL.DEVICE))
    logger = logging.getLogger("nst_det")
    logger.setLevel(logging.INFO)
    for handler in logging.getLogger("detectron2").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream not in (sys.stdout, sys.stderr):
            logger.addHandler(handler)
    register_datasets(cfg)


def train(cfg: CfgNode, folder: RunFolder, resume: bool) -> None:
    """Train, evaluate and write the result."""
    stopped = (folder.path / "last_checkpoint").exists()
    if stopped and not resume:
        log.info("%s: resumes where it was stopped; remove the folder to begin again", folder.path)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=resume or stopped)
    trainer.train()
    if comm.is_main_process():
        # the name and form that the torchvision engine gives it too
        save_weights(folder.path / WEIGHTS_FILE, trainer.state.eval_model, class_list(cfg))
        if cfg.DATASETS.TEST:
            found = inference_folder(cfg, cfg.DATASETS.TEST[0]) / DETECTIONS_FILE
            if found.exists():
                write_text(folder.path / DETECTIONS_FILE, found.read_text(encoding="utf-8"))
        folder.finish(run_result(cfg, trainer))


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Evaluate ``MODEL.WEIGHTS``, or with ``--resume`` what was trained in OUTPUT_DIR, on ``DATASETS.TEST``."""
    weights = str(Path(cfg.OUTPUT_DIR) / WEIGHTS_FILE) if args.resume else cfg.MODEL.WEIGHTS
    if not weights or not cfg.DATASETS.TEST:
        raise UserError(
            "--eval-only needs MODEL.WEIGHTS of a whole detector (or --resume, for the one that was trained in "
            "OUTPUT_DIR) and DATASETS.TEST"
        )
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    # next to the figures, so that a run's own files are left as they are
    _setup(cfg, Path(cfg.OUTPUT_DIR) / "inference", args)
    device = torch.device(cfg.MODEL.DEVICE)
    dtype = amp_dtype(cfg.SOLVER.AMP, device) if cfg.TEST.AMP else None
    log.info(compute_line(device, dtype, cfg.DATALOADER.NUM_WORKERS))
    model = build_model(cfg)
    BackboneCheckpointer(model, whole=True, classes=class_list(cfg)).load(weights)
    if dtype is not None and device.type == "cpu":
        reduce_backbones(model, dtype, test=True)
    DistillTrainer.test(cfg, model)
    for name in cfg.DATASETS.TEST:
        path = inference_folder(cfg, name) / "result.json"
        if comm.is_main_process() and path.exists():
            print_result(read_json(path), name)


def run_result(cfg: CfgNode, trainer: DistillTrainer) -> dict[str, Any]:
    """Return the content of ``result.json``: the fields that both engines write."""
    figures: dict[str, Any] = {}
    # of a data set that Detectron2 registers there are none
    path = inference_folder(cfg, cfg.DATASETS.TEST[0]) / "result.json" if cfg.DATASETS.TEST else None
    if path is not None and path.exists():
        figures = read_json(path)
    validation, transfer = validation_config(cfg), transfer_of(trainer.distilled)
    if validation is not None:
        found = read_json(inference_folder(validation, VALIDATION) / "result.json")
        figures["validation"] = {key: value for key, value in found.items() if key != THRESHOLDS}
        figures |= trainer.validated
    return {
        **figures,
        "seconds": round(trainer.state.seconds, 3),
        "steps": trainer.max_iter,
        "engine": "detectron2",
        "params": count_parameters(trainer.student),
        "seed": cfg.SEED,
        "method": parse_method(cfg.METHOD).word,
        "weights": {} if transfer is None else dict(transfer.weights),
        "losses": last_losses(RunFolder(cfg.OUTPUT_DIR).metrics_path),
    }
