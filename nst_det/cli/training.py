"""Commands that train, or show what training gave."""

import argparse
from pathlib import Path
from typing import Any

from nst_det.cli.command import (
    JOBS,
    METHODS,
    SEEDS,
    TRUST_PICKLE,
    argument,
    command,
    config,
    existing,
    flag,
    setting,
    with_trust,
)
from nst_det.errors import RunFailed, UserError


@command(
    config("distill.yaml", "YAML of stage one, see configs/distill"),
    METHODS,
    TRUST_PICKLE,
    resumes=True,
)
def distill(args: argparse.Namespace) -> None:
    """Stage one: train students by several transfer methods side by side."""
    from nst_det import api
    from nst_det.distillation.config import image_roots, load_distill_config
    from nst_det.engine.config import expand_path
    from nst_det.engine.format import print_table
    from nst_det.engine.progress import start_logging

    start_logging()
    values = with_trust(args.overrides, args, "")
    # what can be wrong with it is told before torch is imported, which takes seconds
    for key, root in image_roots(load_distill_config(args.config_file, values)):
        existing(f"by {key} the images of stage one")(expand_path(root, key)).check()
    from nst_det.engine import device, distributed

    device.keep_freed_memory()
    result = api.distill(args.config_file, values)
    if distributed.is_main_process():
        print_table(result)
    distributed.stop_processes()


# its options are those of Detectron2's training scripts
@command(
    config("detect.yaml", "YAML of stage two, see configs/detect", "opts"),
    flag("--resume", "resume from the last checkpoint; with --eval-only: evaluate this run's model"),
    flag("--eval-only", "evaluate MODEL.WEIGHTS and train nothing"),
    argument("--num-gpus", None, "processes on this machine (Detectron2 engine)", type=int, default=1),
    argument("--num-machines", None, "machines in all (Detectron2 engine)", type=int, default=1),
    argument("--machine-rank", None, "number of this machine (Detectron2 engine)", type=int, default=0),
    argument("--dist-url", None, "where the machines meet (Detectron2 engine)", default="auto"),
    TRUST_PICKLE,
    resumes=True,
)
def train_det(args: argparse.Namespace) -> int | None:
    """Stage two: train and evaluate a detector."""
    from nst_det.data.voc import find_voc_root
    from nst_det.detection import config
    from nst_det.engine.config import config_file
    from nst_det.engine.progress import start_logging

    args.config_file = str(config_file(args.config_file, "detect.yaml"))
    args.opts = with_trust(args.opts, args, "")
    start_logging()
    if config.choose_engine(config.wanted_engine(args.config_file, args.opts), args.config_file) == "detectron2":
        from nst_det import detectron2

        return int(detectron2.main(args))
    if args.num_gpus > 1 or args.num_machines > 1:
        remedy = f"torchrun --nproc-per-node {args.num_gpus} --nnodes {args.num_machines} -m nst_det train-det ..."
        raise UserError(f"--num-gpus, --num-machines: several processes of the torchvision engine need {remedy}")
    cfg = config.load_detect_config(args.config_file, args.opts)
    for part in ("TEST",) if args.eval_only else ("TRAIN", "TEST"):
        for root, _ in config.voc_roots(cfg, cfg.DATASETS[part], f"DATASETS.{part}"):
            find_voc_root(root)
    # torch takes seconds to import
    from nst_det.detection import pipeline
    from nst_det.engine import device, distributed

    device.keep_freed_memory()
    result = pipeline.evaluate_detector(cfg, args.resume) if args.eval_only else pipeline.train_detector(cfg)
    if distributed.is_main_process():
        pipeline.print_result(result, cfg.OUTPUT_DIR)
    distributed.stop_processes()
    return None


@command(
    config("compare.yaml", "YAML of the comparison"),
    METHODS,
    SEEDS,
    setting("--rows", "ROWS", "LIST", "more rows: imagenet, coco, no-fpn, teacher"),
    setting("--tuned", "TUNED", "FILE", "the tuned.yaml of nst-det tune: weights and levels of the methods in it"),
    argument("--output", "DIR", "where everything is written, in place of OUTPUT_DIR"),
    JOBS,
    flag("--dry-run", "print the plan, then its time, disk and memory, measured on a few steps of each kind of run"),
    flag("--plan", "print the runs and what is done of them, measure nothing"),
    argument("--launcher", None, "do the runs here, or on a Ray cluster", choices=("local", "ray"), default="local"),
    argument("--address", "HOST:PORT", "of the Ray cluster (default: here)", default=""),
    TRUST_PICKLE,
    epilog="DISTILL.X VALUE and DETECT.X VALUE set X of that stage's config.",
    resumes=True,
)
def compare(args: argparse.Namespace) -> None:
    """Run a whole comparison of transfer methods and write its report; resumes where it was stopped."""
    from nst_det import api
    from nst_det.comparison.config import load_comparison
    from nst_det.engine.format import print_table
    from nst_det.engine.progress import start_logging

    values = with_trust(args.overrides, args, "DISTILL.", "DETECT.")
    if args.address and args.launcher != "ray":
        raise UserError("--address is that of a Ray cluster; add --launcher ray")
    if args.launcher == "ray" and (args.dry_run or args.plan):
        raise UserError("--launcher ray: --dry-run and --plan look at this machine alone; leave --launcher out")
    if args.dry_run or args.plan:
        comparison = load_comparison(args.config_file, args.output, values)
        from nst_det.comparison import pipeline

        if args.plan:
            pipeline.print_plan(comparison)
        else:
            pipeline.dry_run(comparison, args.jobs)
        return
    address = args.address if args.launcher == "ray" else None
    if address is not None:
        from nst_det.comparison.launch_ray import require_ray

        require_ray()
    start_logging()
    result = api.compare(args.config_file, values, output=args.output, jobs=args.jobs, ray_address=address)
    print_table(result)
    print(f"report: {result.report}")
    if missing := result.results.missing:
        rows = "; ".join(f"{row}, {reason}" for row, reason in missing.items())
        raise RunFailed(
            f"rows without a result: {rows}; set SOLVER.NON_FINITE.POLICY skip or back and call this again, or name "
            "another --output with a lower SOLVER.BASE_LR or a smaller weight of the term",
            1,
        )


@command(
    config("tune.yaml", "YAML of the search"),
    METHODS,
    SEEDS,
    setting("--trials", "TRIALS", "N", "settings tried for each method"),
    argument("--output", "DIR", "where everything is written, in place of OUTPUT_DIR"),
    JOBS,
    resumes=True,
)
def tune(args: argparse.Namespace) -> None:
    """Search weight and levels of each method with the same budget, on images kept from training; needs Optuna."""
    from nst_det.engine.format import print_table
    from nst_det.engine.progress import start_logging
    from nst_det.tune.config import load_tuning

    start_logging()
    tuning = load_tuning(args.config_file, args.output, args.overrides)
    from nst_det.tune import run

    found, path = run.tune(tuning, args.jobs)
    print_table(run.tuning_table(tuning, found))
    print(f"found: {path}")


@command(
    argument("folder", "DIR", "the folder of the comparison; DIR/report/results.json is read"),
    argument("--output", "DIR", "where the report goes instead of DIR/report"),
)
def report(args: argparse.Namespace) -> None:
    """Make the tables and the page of a finished comparison again."""
    from nst_det.comparison.result import ComparisonResult
    from nst_det.report import write_report

    folder = Path(args.folder).expanduser()
    source = folder / "report" / "results.json"
    if not source.exists():
        raise UserError(f"{source}: no such file; finish this comparison with nst-det compare first")
    results = ComparisonResult.load(source)
    output = Path(args.output).expanduser() if args.output else folder / "report"
    write_report(results, output, folder)
    print(output / "index.html")


STEP = existing("the file of a step in the folder nonfinite of a run")


@command(
    argument("file", "FILE", "in the folder nonfinite of the run, as the message named it", type=STEP),
    TRUST_PICKLE,
    epilog="exit code: 0 if the same came out as in the run, 1 if something else did",
)
def replay(args: argparse.Namespace) -> int:
    """Run a step with a non-finite loss or gradient again, from the file that training left."""
    from nst_det.engine.device import gpu_errors_in_one_line
    from nst_det.engine.format import print_table
    from nst_det.engine.nan_guard import read_step, replay
    from nst_det.models.io import trusting_pickles

    content = read_step(args.file)
    with trusting_pickles(args.trust_pickle), gpu_errors_in_one_line("hide the GPU: CUDA_VISIBLE_DEVICES=''"):
        found = replay(content, args.file, rebuild_step)
    print_table(found)
    print("\n".join(found.lines))
    return 0 if found.same else 1


def rebuild_step(content: dict[str, Any]) -> Any:
    """Return the model of a dumped step and a call that makes the step, by the engine that made it."""
    from nst_det.detection.trainer import KIND as DETECT

    if content["kind"] != DETECT:
        from nst_det.distillation.replay import rebuild
    elif content["config"]["ENGINE"] == "torchvision":
        from nst_det.detection.replay import rebuild
    else:
        from nst_det import detectron2

        detectron2.require()
        rebuild = detectron2.rebuild
    return rebuild(content)
