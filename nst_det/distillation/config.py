"""The keys of stage one: their defaults, and what their values may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.engine.config import (
    AMP_DTYPES,
    CLIP_TYPES,
    FLOAT32_PRECISIONS,
    FULL_MODEL,
    check_non_finite,
    load_config,
    merge_tree,
    non_finite_node,
    plain,
    transfer_node,
)
from nst_det.engine.metrics import check_wandb
from nst_det.errors import UserError
from nst_det.losses import parse_method

OWN_KEYS = ("LEVELS", "WEIGHTS", "TERM_LEVELS", "OPTIONS", "AUTO_WEIGHT")


def get_defaults() -> CfgNode:
    """Return the full tree of known keys.  Iterations are optimizer steps; step 0 is the first."""
    config = CfgNode()
    # names the backbone files: <NAME>-teacher, <NAME>-<method>-s<SEED>
    config.NAME = "stage-one"
    config.OUTPUT_DIR = "output/distill"
    # folder for backbone files; "" takes the registry's first folder
    config.REGISTRY = ""
    config.SEED = 0
    # of float32 on a GPU, in convolutions and matrix products alike: highest is float32; high and medium are TF32,
    # which is faster and rounds factors to 11 bits, those of transfer losses too; "" is torch's own (TF32 in
    # convolutions, float32 in products).  What SOLVER.AMP computes in bf16 or fp16 is not float32
    config.FLOAT32_PRECISION = ""
    # open weights that are pickles with more than tensors in them, which can run code; --trust-pickle sets it
    config.TRUST_PICKLE = False
    # one student each; [] trains the teacher alone
    config.METHODS = ["ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly"]
    config.DATA = _data()
    config.TEACHER = _teacher()
    config.CACHE = _cache()
    config.STUDENT = CfgNode({"ARCH": "nst_resnet10_w32", "PRETRAINED": False})
    config.STUDENT.ARCH_KWARGS = CfgNode(new_allowed=True)
    config.TRANSFER = transfer_node()
    config.TRANSFER.LEVELS = ["res3", "res4"]
    # method -> LEVELS, WEIGHTS, TERM_LEVELS, OPTIONS or AUTO_WEIGHT that override those above for this method
    config.TRANSFER.BY_METHOD = CfgNode(new_allowed=True)
    config.SOLVER = _solver()
    config.TEST = CfgNode({"EVAL_PERIOD": 0, "IMS_PER_BATCH": 128})
    # steps between metrics rows
    config.LOG_PERIOD = 20
    config.TENSORBOARD = False
    # a project at Weights & Biases (pip install wandb); "" for none
    config.WANDB = ""
    # worker processes that decode images; 0 does it in this process, which is right where the images fit in memory and
    # the CPU trains; -1 takes 0 on a CPU, and with a GPU one for each core of the run, up to 8
    config.DATALOADER = CfgNode({"NUM_WORKERS": 0})
    return config


def _data() -> CfgNode:
    node = CfgNode()
    # has train/CLASS/* and val/CLASS/*, or CLASS/*; $NAME is replaced from the environment
    node.ROOT = ""
    # auto validates on the val folder where there is one; train holds the validation split out of the training images
    # even so, and leaves the val folder for a final test
    node.VAL_FROM = "auto"
    # of each class, where the split is cut out; VAL_SEED chooses the images, the same whatever the SEED
    node.VAL_FRACTION = 0.1
    node.VAL_SEED = 0
    node.IMAGE_SIZE = 224
    # at evaluation the shortest side becomes IMAGE_SIZE / CROP_RATIO, then the center is cut out
    node.CROP_RATIO = 1.0
    node.MEAN = [0.485, 0.456, 0.406]
    node.STD = [0.229, 0.224, 0.225]
    # decoded images are kept in memory up to this limit, else decoded at each use
    node.CACHE_GIB = 2.0
    node.AUGMENT = CfgNode()
    # pixels by which the image is moved at most, borders reflected; probability of a mirror image
    node.AUGMENT.SHIFT = 0
    node.AUGMENT.HFLIP = 0.0
    # smallest and largest part of the image's area to cut out, [] takes the evaluation's crop
    node.AUGMENT.CROP_AREA = []
    node.AUGMENT.CROP_ASPECT = [0.75, 1.3333333333]
    # brightness, contrast, saturation, hue; [] leaves colors alone
    node.AUGMENT.COLOR_JITTER = []
    return node


def _teacher() -> CfgNode:
    node = CfgNode({"ARCH": "nst_resnet18_w48", "PRETRAINED": False})
    node.ARCH_KWARGS = CfgNode(new_allowed=True)
    # a backbone file or backbone://NAME, or a plain state dict (.pth, .safetensors) of ARCH; "" makes a teacher
    node.WEIGHTS = ""
    # train it first on this data, from PRETRAINED's weights or a plain state dict of other classes, if so; False takes
    # it as it is.  WEIGHTS with these classes, and backbone files, are always taken as they are
    node.TRAIN = True
    # top-1 on the validation split, 0..1; a worse teacher stops the run, 0 takes any
    node.EXPECTED_TOP1 = 0.0
    # keys of SOLVER that differ while the teacher is trained, e.g. {MAX_ITER: 400}
    node.SOLVER = CfgNode(new_allowed=True)
    # keys of DATA.AUGMENT that differ while the teacher is trained
    node.AUGMENT = CfgNode(new_allowed=True)
    return node


def _cache() -> CfgNode:
    node = CfgNode()
    # 0 draws a new augmentation at each step; else each image has this many, and epoch e takes number e mod VIEWS
    node.VIEWS = 0
    # of the views; not SEED, so that runs of several seeds can share a cache
    node.VIEW_SEED = 0
    # where the teacher's outputs for each view are kept, so that it runs once only; "" runs it at each step
    node.DIR = ""
    # auto keeps it as computed, to the bit; fp16 and bf16 round what is float32
    node.DTYPE = "auto"
    # a larger cache is refused before it is written
    node.MAX_GIB = 20.0
    return node


def _solver() -> CfgNode:
    node = CfgNode()
    node.OPTIMIZER = "SGD"
    node.BASE_LR = 0.1
    node.MOMENTUM = 0.9
    node.NESTEROV = True
    node.WEIGHT_DECAY = 1e-4
    # for scales, shifts and biases
    node.WEIGHT_DECAY_NORM = 0.0
    node.MAX_ITER = 1000
    # images of a step, of all processes together
    node.IMS_PER_BATCH = 64
    # parts in which each process takes its images of a step, one after another, to save memory
    node.ACCUMULATE = 1
    # batch normalization over the images of all processes; False takes each process's own
    node.SYNC_BN = False
    # Detectron2's keys, from here to CLIP_GRADIENTS; OneCycleLR, ONECYCLE_RISE and full_model are ours.
    # WarmupMultiStepLR multiplies by GAMMA at each of STEPS ([]: a constant rate); WarmupCosineLR falls to BASE_LR_END
    node.LR_SCHEDULER_NAME = "WarmupCosineLR"
    node.BASE_LR_END = 0.0
    node.STEPS = []
    node.GAMMA = 0.1
    # OneCycleLR: the part of the run in which the rate rises
    node.ONECYCLE_RISE = 0.2
    # for WARMUP_ITERS the rate goes in a line (linear) from WARMUP_FACTOR to where the schedule then is, or waits
    # there (constant)
    node.WARMUP_ITERS = 0
    node.WARMUP_FACTOR = 0.001
    node.WARMUP_METHOD = "linear"
    node.RESCALE_INTERVAL = False
    # steps between checkpoints
    node.CHECKPOINT_PERIOD = 500
    # CLIP_VALUE limits each entry (value), each parameter's norm (norm), or that of all gradients together (full_model)
    node.CLIP_GRADIENTS = CfgNode({"ENABLED": False, "CLIP_TYPE": FULL_MODEL, "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0})
    # of an exponential moving average of the weights: 0 for none, else below 1, such as 0.999; the average is what is
    # validated and written, running statistics averaged too; it begins as the first step's weights, and the decay
    # rises to this value: 1 - t ** (-2 / 3) after t steps.  One pass over the weights a step
    node.EMA_DECAY = 0.0
    # a loss or gradient that is not finite: stop, skip the step, or roll back to the last checkpoint
    node.NON_FINITE = non_finite_node()
    # mixed precision; DTYPE is bf16, fp16, or auto: bf16 where the device is fast in it (NVIDIA's GPUs since Ampere,
    # processors with AVX512-BF16), else float32; the log's first line names it
    node.AMP = CfgNode({"ENABLED": True, "DTYPE": "auto"})
    node.CE_WEIGHT = 1.0
    node.LABEL_SMOOTHING = 0.0
    return node


# key -> predicate of (its value, its node), and what is wanted of it
Rules = Mapping[str, tuple[Callable[[Any, CfgNode], bool], str]]


def _one_of(*choices: str) -> tuple[Callable[[Any, CfgNode], bool], str]:
    return lambda value, _: value in choices, f"one of {', '.join(choice or repr('') for choice in choices)}"


def _from(least: float) -> tuple[Callable[[Any, CfgNode], bool], str]:
    return lambda value, _: value is not None and value >= least, f"at least {least}"


def _are_numbers(values: Sequence[Any], count: int) -> bool:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(values) == len(numbers) == count


def _are_colors(values: Sequence[Any], _: CfgNode) -> bool:
    return _are_numbers(values, 3) and all(0 <= value <= 1 for value in values)


def _are_rising(values: Sequence[Any], _: CfgNode) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values) and list(values) == sorted(set(values))


_ABOVE_0 = (lambda value, _: value > 0, "above 0")
_INSIDE = (lambda value, _: 0 < value < 1, "a fraction between 0 and 1")
_COLORS = (_are_colors, "three numbers on the 0..1 scale, in RGB order")
AUGMENT_RULES: Rules = {
    "SHIFT": _from(0),
    "HFLIP": (lambda value, _: 0 <= value <= 1, "a probability from 0 to 1"),
    "CROP_AREA": (
        lambda area, _: not area or (_are_numbers(area, 2) and 0 < area[0] <= area[1] <= 1),
        "[] or two fractions, smallest first, such as [0.08, 1.0]",
    ),
    "CROP_ASPECT": (lambda ratio, _: _are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1], "two ratios, smallest first"),
    "COLOR_JITTER": (
        lambda jitter, _: not jitter or (_are_numbers(jitter, 4) and min(jitter) >= 0 and jitter[3] <= 0.5),
        "[] or brightness, contrast, saturation (0 or more) and hue (0..0.5)",
    ),
}
SOLVER_RULES: Rules = {
    "OPTIMIZER": _one_of("SGD", "ADAMW"),
    "BASE_LR": _ABOVE_0,
    "BASE_LR_END": (lambda value, node: 0 <= value <= node.BASE_LR, "from 0 to BASE_LR"),
    "MOMENTUM": _from(0),
    "NESTEROV": (lambda value, node: not value or node.MOMENTUM > 0, "False where MOMENTUM is 0"),
    "WEIGHT_DECAY": _from(0),
    "WEIGHT_DECAY_NORM": _from(0),
    "MAX_ITER": _from(1),
    # batch normalization needs two images
    "IMS_PER_BATCH": _from(2),
    "ACCUMULATE": _from(1),
    "LR_SCHEDULER_NAME": _one_of("WarmupMultiStepLR", "WarmupCosineLR", "OneCycleLR"),
    "STEPS": (_are_rising, "rising numbers of steps"),
    "ONECYCLE_RISE": _INSIDE,
    "WARMUP_ITERS": (lambda value, node: 0 <= value <= node.MAX_ITER, "from 0 to MAX_ITER"),
    "WARMUP_METHOD": _one_of("linear", "constant"),
    "CHECKPOINT_PERIOD": _from(1),
    "CLIP_GRADIENTS.CLIP_TYPE": _one_of(*CLIP_TYPES),
    "CLIP_GRADIENTS.CLIP_VALUE": _ABOVE_0,
    "EMA_DECAY": (lambda value, _: 0 <= value < 1, "0 for no average, or a fraction below 1 such as 0.999"),
    "AMP.DTYPE": _one_of(*AMP_DTYPES),
    "CE_WEIGHT": _from(0),
    "LABEL_SMOOTHING": (lambda value, _: 0 <= value < 1, "from 0 to below 1"),
}
RULES: Rules = {
    "FLOAT32_PRECISION": _one_of(*FLOAT32_PRECISIONS),
    "METHODS": (
        lambda values, _: all(isinstance(value, str) for value in values),
        "a list of methods such as [ce, kd, nst-poly]",
    ),
    "DATA.ROOT": (lambda value, _: bool(value), "the path of an image folder"),
    "DATA.VAL_FROM": _one_of("auto", "train"),
    "DATA.VAL_FRACTION": _INSIDE,
    "DATA.IMAGE_SIZE": _from(8),
    "DATA.CROP_RATIO": (lambda value, _: 0 < value <= 1, "a fraction above 0 and up to 1"),
    "DATA.MEAN": _COLORS,
    "DATA.STD": (lambda values, node: _are_colors(values, node) and min(values) > 0, f"above 0, {_COLORS[1]}"),
    "DATA.CACHE_GIB": _from(0),
    "TEACHER.EXPECTED_TOP1": (lambda value, _: 0 <= value <= 1, "a fraction from 0 to 1"),
    "CACHE.VIEWS": (lambda value, node: value >= (1 if node.DIR else 0), "0, or at least 1 where CACHE.DIR is set"),
    "CACHE.DTYPE": _one_of("auto", "fp16", "bf16"),
    "CACHE.DIR": (lambda value, node: value or node.DTYPE == "auto", "set where CACHE.DTYPE is not auto"),
    "CACHE.MAX_GIB": _ABOVE_0,
    "TEST.EVAL_PERIOD": _from(0),
    "TEST.IMS_PER_BATCH": _from(1),
    "LOG_PERIOD": _from(1),
    # -1 takes what fits the machine
    "DATALOADER.NUM_WORKERS": _from(-1),
}


def load_distill_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return defaults, file and overrides, checked value by value."""
    config = load_config(get_defaults(), file, overrides)
    check_config(config)
    return config


def check_config(config: CfgNode) -> None:
    """Refuse values out of range before anything is read or written; the line names the key."""
    _check(config, RULES)
    solvers = {"SOLVER": config.SOLVER, "TEACHER.SOLVER": teacher_solver(config)}
    for key, node in solvers.items():
        _check(node, SOLVER_RULES, f"{key}.")
        check_non_finite(node.NON_FINITE, f"{key}.NON_FINITE")
    _check(config.DATA.AUGMENT, AUGMENT_RULES, "DATA.AUGMENT.")
    _check(teacher_augment(config), AUGMENT_RULES, "TEACHER.AUGMENT.")
    try:
        methods = [parse_method(name).word for name in config.METHODS]
    except ValueError as error:
        raise UserError(f"METHODS: {error}") from error
    for name, keys in plain(config.TRANSFER.BY_METHOD).items():
        if methods and name not in methods:
            raise UserError(f"config: TRANSFER.BY_METHOD.{name} must be one of METHODS: {', '.join(methods)}")
        if not isinstance(keys, dict) or not set(keys) <= set(OWN_KEYS):
            raise UserError(f"config: TRANSFER.BY_METHOD.{name} must be a mapping with {', '.join(OWN_KEYS)} alone")
        transfer_of(config, name)
    check_wandb(config.WANDB, "config")


def _check(config: CfgNode, rules: Rules, prefix: str = "") -> None:
    for key, (fits, wanted) in rules.items():
        node, *below = config, *key.split(".")
        for part in below[:-1]:
            node = node[part]
        if not fits(node[below[-1]], node):
            raise UserError(f"config: {prefix}{key} must be {wanted}")


def teacher_solver(config: CfgNode) -> CfgNode:
    """Return SOLVER with TEACHER.SOLVER's keys put over it."""
    return _overlaid(config.SOLVER, config.TEACHER.SOLVER, "TEACHER.SOLVER")


def teacher_augment(config: CfgNode) -> CfgNode:
    """Return DATA.AUGMENT with TEACHER.AUGMENT's keys put over it."""
    return _overlaid(config.DATA.AUGMENT, config.TEACHER.AUGMENT, "TEACHER.AUGMENT")


def transfer_of(config: CfgNode, method: str) -> CfgNode:
    """Return TRANSFER with the keys of BY_METHOD for one method, by its canonical name, put over it."""
    node = config.TRANSFER.clone()
    node.defrost()
    own = node.pop("BY_METHOD").get(method, {})
    return _overlaid(node, own, f"config: TRANSFER.BY_METHOD.{method}")


def _overlaid(base: CfgNode, changes: CfgNode, source: str) -> CfgNode:
    result = base.clone()
    result.defrost()
    merge_tree(result, plain(changes), source)
    return result
