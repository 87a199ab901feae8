"""``nst-det train-det``: stage two, a detector on a distilled backbone."""

from __future__ import annotations

import argparse

from nst_det.commands import add_trust_pickle, trust_words

HELP = "stage two: train and evaluate a detector"
RESUMES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word; they are those of Detectron2's training scripts."""
    parser.add_argument("--config-file", metavar="FILE", required=True, help="YAML of stage two, see configs/detect")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint; with --eval-only: evaluate this run's model",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and train nothing")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (Detectron2 engine)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in all (Detectron2 engine)")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine (Detectron2 engine)")
    parser.add_argument("--dist-url", default="auto", help="where the machines meet (Detectron2 engine)")
    add_trust_pickle(parser)
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="keys of the config with other values"
    )


def run(args: argparse.Namespace) -> int:
    """Train, or evaluate, and print what came out."""
    from nst_det.detection.config import choose_engine, load_detect_config, wanted_engine
    from nst_det.engine.distributed import is_main_process, stop_processes
    from nst_det.engine.progress import start_logging
    from nst_det.errors import UserError

    args.opts = [*args.opts, *trust_words(args, "")]
    start_logging()
    engine = choose_engine(wanted_engine(args.config_file, args.opts), args.config_file)
    if engine == "detectron2":
        from nst_det import detectron2

        return int(detectron2.main(args))
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError(
            "--num-gpus, --num-machines: the torchvision engine is started in several processes by torchrun: "
            f"torchrun --nproc-per-node {args.num_gpus} --nnodes {args.num_machines} -m nst_det train-det ..."
        )
    from nst_det.detection.pipeline import evaluate_detector, print_result, train_detector
    from nst_det.engine.device import keep_freed_memory

    keep_freed_memory()
    config = load_detect_config(args.config_file, args.opts)
    result = evaluate_detector(config, args.resume) if args.eval_only else train_detector(config)
    if is_main_process():
        print_result(result, config.OUTPUT_DIR)
    stop_processes()
    return 0
