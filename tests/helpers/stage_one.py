"""Small runs of stage one."""

from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.engine.metrics import read_metrics

STEPS = 8
METHODS = ["ce", "fitnet", "kd+nst-poly"]
SMALL = {
    "NAME": "small",
    "METHODS": METHODS,
    "DATA.IMAGE_SIZE": 32,
    "DATA.AUGMENT.SHIFT": 2,
    "DATA.AUGMENT.HFLIP": 0.5,
    # dropout: what it draws may not depend on who trains with it
    "STUDENT.ARCH_KWARGS": {"drop_rate": 0.2},
    "TEACHER.ARCH": "nst_resnet10_w32",
    "TEACHER.SOLVER": {"MAX_ITER": 10},
    "TRANSFER.WEIGHTS": {"fitnet": 1.0, "nst-poly": 10.0},
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BASE_LR": 2e-3,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.IMS_PER_BATCH": 7,
    "SOLVER.CLIP_GRADIENTS": {"ENABLED": True, "CLIP_VALUE": 5.0},
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.CHECKPOINT_PERIOD": 4,
    "TEST.EVAL_PERIOD": 3,
    "LOG_PERIOD": 1,
}


def overrides(images, output, **keys):
    """The command line of a small run."""
    values = {"DATA.ROOT": images, "OUTPUT_DIR": output, "REGISTRY": output / "backbones", **SMALL, **keys}
    return [str(word) for pair in values.items() for word in pair]


def config(images, output, **keys):
    return load_distill_config(None, overrides(images, output, **keys))


def run(images, output, **keys):
    return distill(config(images, output, **keys))


def metrics(output, method):
    return read_metrics(output / "students" / method / "metrics.jsonl")


def assert_same_run(output, other, results, others, methods=METHODS):
    for method in methods:
        assert results[method]["sha256"] == others[method]["sha256"], method
        assert metrics(output, method) == metrics(other, method)
        for key in ("top1", "top5", "top1_best", "step_best", "steps", "seed", "params"):
            assert results[method][key] == others[method][key]
