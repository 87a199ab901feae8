"""The keys of stage one, with their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.engine.config import load_config, merge_tree, plain, transfer_node
from nst_det.engine.device import AMP_DTYPES, FLOAT32_PRECISIONS
from nst_det.engine.metrics import check_wandb
from nst_det.engine.nan_guard import check_non_finite, non_finite_node
from nst_det.errors import UserError
from nst_det.losses import parse_method

OPTIMIZERS = ("SGD", "ADAMW")
CACHE_DTYPES = ("auto", "fp16", "bf16")
VAL_SOURCES = ("auto", "train")
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "OneCycleLR")
WARMUP_METHODS = ("linear", "constant")
CLIP_TYPES = ("value", "norm", "full_model")


def get_defaults() -> CfgNode:
    """The full tree of known keys.  Iterations are optimizer steps; step 0 is the first."""
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
    # a method's word -> LEVELS, WEIGHTS, TERM_LEVELS, OPTIONS or AUTO_WEIGHT that go over those above for this method
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
    # train/CLASS/* and val/CLASS/* stand below it, or CLASS/*; $NAME is replaced from the environment
    node.ROOT = ""
    # auto validates on the val folder where there is one; train cuts the validation split out of the training images
    # all the same, so that the val folder is left for the last word
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
    # train it first on this data (from PRETRAINED's weights, if so); False takes it as it is
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
    # where what the teacher says about each view is kept, so that it is asked once only; "" asks it at each step
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
    node.CLIP_GRADIENTS = CfgNode({"ENABLED": False, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0})
    # of an exponential moving average of the weights: 0 for none, else below 1, such as 0.999; the average is what is
    # validated and written, running statistics averaged too; it begins as the first step's weights, and the decay
    # rises to this value: 1 - t ** (-2 / 3) after t steps.  One pass over the weights a step
    node.EMA_DECAY = 0.0
    # a loss or gradient that is not finite: stop, skip the step, or roll back to the last checkpoint
    node.NON_FINITE = non_finite_node()
    # mixed precision; DTYPE is bf16, fp16, or auto: bf16 where the device is fast in it (NVIDIA's GPUs since Ampere,
    # processors with AVX512-BF16), else float32; the log's first line says which
    node.AMP = CfgNode({"ENABLED": True, "DTYPE": "auto"})
    node.CE_WEIGHT = 1.0
    node.LABEL_SMOOTHING = 0.0
    return node


def load_distill_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, file and overrides, checked value by value.

    Raises:
        UserError: an unknown key, a wrong type, or a value out of range; the line names the key.
    """
    config = load_config(get_defaults(), file, overrides)
    check_config(config)
    return config


def check_config(config: CfgNode) -> None:
    """Refuse values out of range before anything is read or written.

    Raises:
        UserError: the line names the key.
    """
    _check_data(config.DATA)
    _check_solver(config.SOLVER, "SOLVER")
    _check_solver(teacher_solver(config), "TEACHER.SOLVER")
    _check_augment(teacher_augment(config), "TEACHER.AUGMENT")
    _require(0 <= config.TEACHER.EXPECTED_TOP1 <= 1, "TEACHER.EXPECTED_TOP1", "a fraction from 0 to 1")
    known = config.FLOAT32_PRECISION in FLOAT32_PRECISIONS
    _require(known, "FLOAT32_PRECISION", f'one of {", ".join(FLOAT32_PRECISIONS[1:])}, or ""')
    _require(config.TEST.EVAL_PERIOD >= 0, "TEST.EVAL_PERIOD", "a number of steps, 0 for the end only")
    _require(config.TEST.IMS_PER_BATCH > 0, "TEST.IMS_PER_BATCH", "at least 1")
    _require(config.LOG_PERIOD > 0, "LOG_PERIOD", "at least 1")
    _require(
        config.DATALOADER.NUM_WORKERS >= -1, "DATALOADER.NUM_WORKERS", "0 or more, or -1 for what fits the machine"
    )
    _check_cache(config.CACHE)
    words = all(isinstance(word, str) for word in config.METHODS)
    _require(words, "METHODS", "a list of method words such as [ce, kd, nst-poly]")
    _check_by_method(config)
    check_wandb(config.WANDB, "config")


def teacher_solver(config: CfgNode) -> CfgNode:
    """SOLVER with TEACHER.SOLVER's keys put over it."""
    return _overlaid(config.SOLVER, config.TEACHER.SOLVER, "TEACHER.SOLVER")


def teacher_augment(config: CfgNode) -> CfgNode:
    """DATA.AUGMENT with TEACHER.AUGMENT's keys put over it."""
    return _overlaid(config.DATA.AUGMENT, config.TEACHER.AUGMENT, "TEACHER.AUGMENT")


def transfer_of(config: CfgNode, word: str) -> CfgNode:
    """TRANSFER for one method: with what BY_METHOD has for its word put over it, and without BY_METHOD.

    Args:
        config: the whole config.
        word: the method's canonical word.

    Raises:
        UserError: a key of BY_METHOD is unknown or has a value of the wrong type.
    """
    node = config.TRANSFER.clone()
    node.defrost()
    changes = plain(node.pop("BY_METHOD")).get(word, {})
    merge_tree(node, changes, f"config: TRANSFER.BY_METHOD.{word}")
    return node


def _check_by_method(config: CfgNode) -> None:
    try:
        methods = [parse_method(word).word for word in config.METHODS]
    except ValueError as error:
        raise UserError(f"METHODS: {error}") from error
    for word in config.TRANSFER.BY_METHOD:
        _require(not methods or word in methods, f"TRANSFER.BY_METHOD.{word}", f"one of METHODS: {', '.join(methods)}")
        known = ("LEVELS", "WEIGHTS", "TERM_LEVELS", "OPTIONS", "AUTO_WEIGHT")
        keys = plain(config.TRANSFER.BY_METHOD[word])
        named = isinstance(keys, dict) and set(keys) <= set(known)
        _require(named, f"TRANSFER.BY_METHOD.{word}", f"a mapping with {', '.join(known)} alone")
        transfer_of(config, word)


def _overlaid(base: CfgNode, changes: CfgNode, key: str) -> CfgNode:
    result = base.clone()
    result.defrost()
    merge_tree(result, plain(changes), key)
    return result


def _require(fits: bool, key: str, wanted: str) -> None:
    if not fits:
        raise UserError(f"config: {key} must be {wanted}")


def _check_data(data: CfgNode) -> None:
    _require(bool(data.ROOT), "DATA.ROOT", "the path of an image folder")
    _require(data.IMAGE_SIZE >= 8, "DATA.IMAGE_SIZE", "at least 8 pixels")
    _require(data.VAL_FROM in VAL_SOURCES, "DATA.VAL_FROM", f"one of {', '.join(VAL_SOURCES)}")
    _require(0 < data.VAL_FRACTION < 1, "DATA.VAL_FRACTION", "a fraction between 0 and 1")
    _require(0 < data.CROP_RATIO <= 1, "DATA.CROP_RATIO", "a fraction above 0 and up to 1")
    _require(data.CACHE_GIB >= 0, "DATA.CACHE_GIB", "0 or more")
    for key in ("MEAN", "STD"):
        numbers = _are_numbers(data[key], 3) and all(0 <= value <= 1 for value in data[key])
        _require(numbers, f"DATA.{key}", "three numbers on the 0..1 scale, in RGB order")
    _require(all(value > 0 for value in data.STD), "DATA.STD", "above 0")
    _check_augment(data.AUGMENT, "DATA.AUGMENT")


def _check_cache(node: CfgNode) -> None:
    _require(node.VIEWS >= 0, "CACHE.VIEWS", "a number of views of each image, 0 for new ones at each step")
    _require(node.VIEWS > 0 or not node.DIR, "CACHE.VIEWS", "at least 1 where CACHE.DIR is set")
    _require(node.DTYPE in CACHE_DTYPES, "CACHE.DTYPE", f"one of {', '.join(CACHE_DTYPES)}")
    _require(node.DTYPE == "auto" or bool(node.DIR), "CACHE.DTYPE", "auto where CACHE.DIR is not set")
    _require(node.MAX_GIB > 0, "CACHE.MAX_GIB", "above 0")


def _check_augment(node: CfgNode, key: str) -> None:
    _require(node.SHIFT >= 0, f"{key}.SHIFT", "a number of pixels, 0 or more")
    _require(0 <= node.HFLIP <= 1, f"{key}.HFLIP", "a probability from 0 to 1")
    area = not node.CROP_AREA or (_are_numbers(node.CROP_AREA, 2) and 0 < node.CROP_AREA[0] <= node.CROP_AREA[1] <= 1)
    _require(area, f"{key}.CROP_AREA", "[] or two fractions, smallest first, such as [0.08, 1.0]")
    aspect = _are_numbers(node.CROP_ASPECT, 2) and 0 < node.CROP_ASPECT[0] <= node.CROP_ASPECT[1]
    _require(aspect, f"{key}.CROP_ASPECT", "two ratios, smallest first")
    jitter = node.COLOR_JITTER
    fits = not jitter or (_are_numbers(jitter, 4) and min(jitter) >= 0 and jitter[3] <= 0.5)
    _require(fits, f"{key}.COLOR_JITTER", "[] or brightness, contrast, saturation (0 or more) and hue (0..0.5)")


def _check_solver(node: CfgNode, key: str) -> None:
    _require(node.OPTIMIZER in OPTIMIZERS, f"{key}.OPTIMIZER", f"one of {', '.join(OPTIMIZERS)}")
    _require(node.LR_SCHEDULER_NAME in SCHEDULES, f"{key}.LR_SCHEDULER_NAME", f"one of {', '.join(SCHEDULES)}")
    _require(node.WARMUP_METHOD in WARMUP_METHODS, f"{key}.WARMUP_METHOD", f"one of {', '.join(WARMUP_METHODS)}")
    _require(node.AMP.DTYPE in AMP_DTYPES, f"{key}.AMP.DTYPE", f"one of {', '.join(AMP_DTYPES)}")
    _require(node.BASE_LR > 0, f"{key}.BASE_LR", "above 0")
    _require(node.MAX_ITER > 0, f"{key}.MAX_ITER", "at least 1")
    _require(node.IMS_PER_BATCH > 1, f"{key}.IMS_PER_BATCH", "at least 2 (batch normalization needs two images)")
    _require(node.ACCUMULATE >= 1, f"{key}.ACCUMULATE", "at least 1")
    _require(node.MOMENTUM >= 0, f"{key}.MOMENTUM", "0 or more")
    _require(not node.NESTEROV or node.MOMENTUM > 0, f"{key}.NESTEROV", "False where MOMENTUM is 0")
    _require(0 <= node.WARMUP_ITERS <= node.MAX_ITER, f"{key}.WARMUP_ITERS", "from 0 to MAX_ITER")
    _require(0 < node.ONECYCLE_RISE < 1, f"{key}.ONECYCLE_RISE", "a fraction between 0 and 1")
    clip = node.CLIP_GRADIENTS
    _require(clip.CLIP_TYPE in CLIP_TYPES, f"{key}.CLIP_GRADIENTS.CLIP_TYPE", f"one of {', '.join(CLIP_TYPES)}")
    _require(clip.CLIP_VALUE > 0, f"{key}.CLIP_GRADIENTS.CLIP_VALUE", "above 0")
    _require(0 <= node.BASE_LR_END <= node.BASE_LR, f"{key}.BASE_LR_END", "from 0 to BASE_LR")
    _require(node.CHECKPOINT_PERIOD > 0, f"{key}.CHECKPOINT_PERIOD", "at least 1")
    _require(node.WEIGHT_DECAY >= 0 and node.WEIGHT_DECAY_NORM >= 0, f"{key}.WEIGHT_DECAY", "0 or more")
    _require(0 <= node.LABEL_SMOOTHING < 1, f"{key}.LABEL_SMOOTHING", "from 0 to below 1")
    _require(0 <= node.EMA_DECAY < 1, f"{key}.EMA_DECAY", "0 for no average, or a fraction below 1 such as 0.999")
    check_non_finite(node.NON_FINITE, f"{key}.NON_FINITE")
    _require(node.CE_WEIGHT >= 0, f"{key}.CE_WEIGHT", "0 or more")
    steps = all(isinstance(step, int) and step > 0 for step in node.STEPS) and list(node.STEPS) == sorted(
        set(node.STEPS)
    )
    _require(steps, f"{key}.STEPS", "rising numbers of steps")


def _are_numbers(values: Any, count: int) -> bool:
    """Whether ``values`` is a list of ``count`` numbers."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return len(values) == len(numbers) == count
