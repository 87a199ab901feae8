"""The keys of stage one: their defaults, and what their values may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.engine.config import config_file, load_config, merge_tree, plain
from nst_det.engine.keys import (
    ABOVE_0_TO_1,
    AMP_DTYPES,
    CLIP_TYPE,
    CLIP_TYPES,
    COMPILE,
    CUDNN_BENCHMARK,
    EMA_DECAY,
    FLOAT32_PRECISION,
    FROM_0_TO_1,
    FULL_MODEL,
    NON_FINITE_KEYS,
    TENSORBOARD,
    TRANSFER_KEYS,
    TRUST_PICKLE,
    WANDB,
    Key,
    are_numbers,
    at_least,
    below_one,
    config_tree,
    one_of,
)
from nst_det.engine.metrics import check_wandb
from nst_det.errors import UserError
from nst_det.losses import parse_method

KNN, LINEAR, AGREEMENT, CKA = "knn", "linear", "agreement", "cka"
# what networks are judged by, as tables head it
HEADS = {"top1": "top-1", "top5": "top-5", KNN: "k-NN", LINEAR: "linear probe", AGREEMENT: "agreement", CKA: "CKA"}
OWN_KEYS = ("LEVELS", "WEIGHTS", "TERM_LEVELS", "OPTIONS", "AUTO_WEIGHT")


def _are_colors(values: Sequence[Any]) -> bool:
    return are_numbers(values, 3) and all(0 <= value <= 1 for value in values)


def _are_scales(values: Sequence[Any]) -> bool:
    return _are_colors(values) and min(values) > 0


def _are_rising(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values) and list(values) == sorted(set(values))


def _are_names(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and value for value in values)


_ABOVE_0 = ("above 0", lambda value: value > 0)
_INSIDE = ("a fraction between 0 and 1", lambda value: 0 < value < 1)
_COLORS = "three numbers on the 0..1 scale, in RGB order"

# iterations are optimizer steps; step 0 is the first
KEYS: dict[str, Key] = {
    "NAME": Key("stage-one", "begins the names of the backbone files: NAME-teacher, NAME-METHOD-sSEED"),
    "OUTPUT_DIR": Key("output/distill", "the folder of the run"),
    "REGISTRY": Key("", 'folder for the backbone files; "" takes the first one of $NST_DET_BACKBONES'),
    "SEED": Key(0, "of all random draws"),
    "FLOAT32_PRECISION": FLOAT32_PRECISION,
    "CUDNN_BENCHMARK": CUDNN_BENCHMARK,
    "TRUST_PICKLE": TRUST_PICKLE,
    "METHODS": Key(
        ["ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly"],
        "a student for each; [] trains the teacher alone",
        "a list of methods such as [ce, kd, nst-poly]",
        _are_names,
    ),
    "DATA.ROOT": Key(
        "",
        "the path of an image folder (train/CLASS/* and val/CLASS/*, or CLASS/*), or of CIFAR-10, CIFAR-100 or MNIST "
        "as published; a folder, or a tar archive of one",
        "the path of an image folder",
        bool,
    ),
    "DATA.LABELS": Key(
        True,
        "False learns from images without labels: those in and below ROOT, at any depth, or in train and val there; "
        "by terms that read no labels, from a teacher of any or no classes, which is taken as it is",
    ),
    "DATA.MORE_ROOTS": Key(
        [],
        "more of them, whose images join those; classes of the same name are one class",
        "a list of paths of image folders",
        _are_names,
    ),
    "DATA.PER_CLASS": at_least(
        "labelled images of each class for the students, chosen by VAL_SEED; 0 takes all, as a teacher does", 0, 0
    ),
    "DATA.REST": one_of(
        "what happens to the other images: drop leaves them out; unlabelled keeps them for the transfer terms, without "
        "their labels",
        "drop",
        "unlabelled",
    ),
    "DATA.VAL_FROM": one_of(
        "auto validates on the val folder where there is one; train cuts the validation split out of the training "
        "images even so, and leaves the val folder for a final test",
        "auto",
        "train",
    ),
    "DATA.VAL_FRACTION": Key(0.1, "share of each class that is validated on, where the split is cut out", *_INSIDE),
    "DATA.VAL_SEED": Key(0, "chooses these images, the same whatever the SEED"),
    "DATA.IMAGE_SIZE": at_least("side of an image, pixels", 8, default=224),
    "DATA.CROP_RATIO": Key(
        1.0,
        "at evaluation the shortest side becomes IMAGE_SIZE / CROP_RATIO, then the center is cut out",
        *ABOVE_0_TO_1,
    ),
    "DATA.MEAN": Key([0.485, 0.456, 0.406], "subtracted from the pixels", _COLORS, _are_colors),
    "DATA.STD": Key([0.229, 0.224, 0.225], "what they are then divided by", f"{_COLORS}, above 0", _are_scales),
    "DATA.CACHE_GIB": at_least("decoded images are kept in memory up to this limit, else decoded at each use", 0, 2.0),
    "DATA.AUGMENT.SHIFT": at_least(
        "pixels by which an image is moved at most, borders reflected; below IMAGE_SIZE", 0, default=0
    ),
    "DATA.AUGMENT.HFLIP": Key(0.0, "probability of a mirror image", *FROM_0_TO_1),
    "DATA.AUGMENT.CROP_AREA": Key(
        [],
        "smallest and largest part of the image's area to cut out; [] takes the evaluation's crop",
        "[] or two fractions, smallest first, such as [0.08, 1.0]",
        lambda area: not area or (are_numbers(area, 2) and 0 < area[0] <= area[1] <= 1),
    ),
    "DATA.AUGMENT.CROP_ASPECT": Key(
        [0.75, 1.3333333333],
        "smallest and largest width / height of that cut",
        "two ratios, smallest first",
        lambda ratio: are_numbers(ratio, 2) and 0 < ratio[0] <= ratio[1],
    ),
    "DATA.AUGMENT.COLOR_JITTER": Key(
        [],
        "how much colors are changed; [] leaves them alone",
        "[] or brightness, contrast, saturation (0 or more) and hue (0..0.5)",
        lambda jitter: not jitter or (are_numbers(jitter, 4) and min(jitter) >= 0 and jitter[3] <= 0.5),
    ),
    "TEACHER.ARCH": Key("nst_resnet18_w48", "timm name of the teacher"),
    "TEACHER.PRETRAINED": Key(False, "begin with timm's published weights"),
    "TEACHER.ARCH_KWARGS": Key({}, "more arguments of the architecture"),
    "TEACHER.WEIGHTS": Key(
        "",
        "a backbone file, backbone://NAME, weights of ARCH from elsewhere (.pth, .safetensors), or their name at timm "
        'or Hugging Face (resnet50.a1_in1k, hf-hub:ORG/NAME); "" makes a teacher',
    ),
    "TEACHER.TRAIN": Key(
        True,
        "train it first on this data, starting from PRETRAINED's weights or from WEIGHTS with other classes, if given; "
        "False uses it as it is. Backbone files, WEIGHTS that already have these classes, and every teacher with "
        "DATA.LABELS False are used as they are",
    ),
    "TEACHER.EXPECTED_TOP1": Key(
        0.0, "top-1 on the validation split; a worse teacher stops the run, 0 takes any", *FROM_0_TO_1
    ),
    "TEACHER.IMAGE_SIZE": Key(
        0,
        "side of the images that a teacher sees which isn't trained here; 0 takes DATA's",
        "0 or at least 8",
        lambda value: value == 0 or value >= 8,
    ),
    "TEACHER.MEAN": Key(
        [],
        "as DATA.MEAN, for the images of such a teacher; [] takes DATA's",
        f"[] or {_COLORS}",
        lambda values: not values or _are_colors(values),
    ),
    "TEACHER.STD": Key([], "likewise", f"[] or {_COLORS}, above 0", lambda values: not values or _are_scales(values)),
    "TEACHER.SOLVER": Key({}, "keys of SOLVER that differ while the teacher is trained, such as {MAX_ITER: 400}"),
    "TEACHER.AUGMENT": Key({}, "keys of DATA.AUGMENT that differ while the teacher is trained"),
    "CACHE.VIEWS": Key(
        0,
        "0 draws a new augmentation at each step; else each image has this many, and epoch e takes number e mod VIEWS",
    ),
    "CACHE.VIEW_SEED": Key(0, "of the views; not SEED, so that runs of several seeds can share a cache"),
    "CACHE.DIR": Key(
        "", 'where the teacher\'s outputs for each view are kept, so that it runs once only; "" runs it at each step'
    ),
    "CACHE.DTYPE": one_of(
        "auto keeps outputs as computed, to the bit; fp16 and bf16 round what is float32", "auto", "fp16", "bf16"
    ),
    "CACHE.MAX_GIB": Key(20.0, "a larger cache is refused before it is written", *_ABOVE_0),
    "STUDENT.ARCH": Key("nst_resnet10_w32", "timm name of the students"),
    "STUDENT.PRETRAINED": Key(False, "begin with timm's published weights"),
    "STUDENT.WEIGHTS": Key(
        "",
        "begin with a backbone file, backbone://NAME, weights of ARCH from elsewhere, or their name at timm or Hugging "
        "Face; a head of another number of classes, or by a backbone file's card of other names, is left out",
    ),
    "STUDENT.ARCH_KWARGS": Key({}, "more arguments of the architecture"),
    **{f"TRANSFER.{name}": key for name, key in TRANSFER_KEYS.items()},
    "TRANSFER.LEVELS": TRANSFER_KEYS["LEVELS"]._replace(default=["res3", "res4"]),
    "TRANSFER.BY_METHOD": Key({}, f"method -> {', '.join(OWN_KEYS)} that override those above for this method"),
    "SOLVER.OPTIMIZER": one_of("the optimizer", "SGD", "ADAMW"),
    "SOLVER.BASE_LR": Key(0.1, "learning rate", *_ABOVE_0),
    "SOLVER.MOMENTUM": at_least("of SGD", 0, default=0.9),
    "SOLVER.NESTEROV": Key(True, "Nesterov's momentum"),
    "SOLVER.WEIGHT_DECAY": at_least("of weights", 0, default=1e-4),
    "SOLVER.WEIGHT_DECAY_NORM": at_least("of scales, shifts and biases", 0, default=0.0),
    "SOLVER.MAX_ITER": at_least("steps", 1, default=1000),
    # batch normalization needs two images
    "SOLVER.IMS_PER_BATCH": at_least("images of a step, of all processes together", 2, default=64),
    "SOLVER.ACCUMULATE": at_least(
        "parts in which each process takes its images of a step, one after another, to save memory", 1, default=1
    ),
    "SOLVER.SYNC_BN": Key(False, "batch normalization over the images of all processes, not of each alone"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "learning rate times GAMMA at each of STEPS, falling to BASE_LR_END, or rising before it falls",
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "OneCycleLR",
        default="WarmupCosineLR",
    ),
    "SOLVER.BASE_LR_END": Key(0.0, "where WarmupCosineLR ends"),
    "SOLVER.STEPS": Key([], "of WarmupMultiStepLR; [] keeps the rate", "rising numbers of steps", _are_rising),
    "SOLVER.GAMMA": Key(0.1, "of WarmupMultiStepLR"),
    "SOLVER.ONECYCLE_RISE": Key(0.2, "of OneCycleLR: the part of the run in which the rate rises", *_INSIDE),
    "SOLVER.WARMUP_ITERS": Key(0, "steps in which the rate rises to its schedule's"),
    "SOLVER.WARMUP_FACTOR": Key(0.001, "where it begins, as a part of BASE_LR"),
    "SOLVER.WARMUP_METHOD": one_of("linear rises in a line; constant stays at WARMUP_FACTOR", "linear", "constant"),
    "SOLVER.RESCALE_INTERVAL": Key(False, "rescale the schedule to the steps after the warm-up"),
    "SOLVER.CHECKPOINT_PERIOD": at_least("steps between checkpoints", 1, default=500),
    "SOLVER.CLIP_GRADIENTS.ENABLED": Key(False, "clip gradients"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(CLIP_TYPE, *CLIP_TYPES, default=FULL_MODEL),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Key(1.0, "the limit", *_ABOVE_0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Key(2.0, "which p-norm"),
    "SOLVER.EMA_DECAY": EMA_DECAY,
    **{f"SOLVER.NON_FINITE.{name}": key for name, key in NON_FINITE_KEYS.items()},
    "SOLVER.AMP.ENABLED": Key(True, "mixed precision"),
    "SOLVER.AMP.DTYPE": one_of(
        "auto is bf16 where the device is fast in it (NVIDIA's GPUs since Ampere, processors with AVX512-BF16), else "
        "float32; the log's first line names it",
        *AMP_DTYPES,
    ),
    "SOLVER.COMPILE": COMPILE,
    "SOLVER.CE_WEIGHT": at_least("weight of the labels' cross-entropy", 0, default=1.0),
    "SOLVER.LABEL_SMOOTHING": below_one("of the labels", "smoothing", 0.1),
    "TEST.PROBE.ROOT": Key(
        "",
        "without labels: a labelled image folder, in any form that DATA.ROOT takes, on which features are judged: its "
        'training images classify its validation images; "" measures agreement with the teacher alone',
    ),
    "TEST.PROBE.BY": Key(KNN, "knn: the nearest features vote; linear: a linear classifier is trained on the features"),
    "TEST.PROBE.NEIGHBORS": at_least("how many of the nearest features vote", 1, default=20),
    "TEST.EVAL_PERIOD": at_least("steps between validations; 0 validates at the end alone", 0, default=0),
    "TEST.IMS_PER_BATCH": at_least("images of a batch of the validation", 1, default=128),
    "LOG_PERIOD": at_least("steps between rows of the metrics", 1, default=20),
    "TENSORBOARD": TENSORBOARD,
    "WANDB": WANDB,
    "DATALOADER.NUM_WORKERS": at_least(
        "workers that decode images for training and evaluation: on a GPU, processes that work ahead; on a CPU, "
        "threads that alternate with the networks; 0 decodes in the process itself, -1 takes one for each core of the "
        "run, up to 8",
        -1,
        default=0,
    ),
}


def get_defaults() -> CfgNode:
    """Return the full tree of known keys."""
    return config_tree(KEYS)


# key -> predicate of (its value, its node), and what is wanted of it
Rules = Mapping[str, tuple[Callable[[Any, CfgNode], Any], str]]
# beside what KEYS says of a value alone
RULES: Rules = {
    "STUDENT.WEIGHTS": (lambda value, node: not (value and node.PRETRAINED), "empty where STUDENT.PRETRAINED is True"),
    "CACHE.VIEWS": (lambda value, node: value >= (1 if node.DIR else 0), "0, or at least 1 where CACHE.DIR is set"),
    "CACHE.DIR": (lambda value, node: value or node.DTYPE == "auto", "set where CACHE.DTYPE is not auto"),
    "SOLVER.BASE_LR_END": (lambda value, node: 0 <= value <= node.BASE_LR, "from 0 to BASE_LR"),
    "SOLVER.NESTEROV": (lambda value, node: not value or node.MOMENTUM > 0, "False where MOMENTUM is 0"),
    "SOLVER.WARMUP_ITERS": (lambda value, node: 0 <= value <= node.MAX_ITER, "from 0 to MAX_ITER"),
    "TEST.PROBE.BY": (
        lambda value, node: value == KNN or (value == LINEAR and node.ROOT),
        f"{KNN}, or {LINEAR} where TEST.PROBE.ROOT is set",
    ),
}
# where DATA.LABELS is True, and where it is False
LABELLED_RULES: Rules = {"TEST.PROBE.ROOT": (lambda value, _: not value, 'empty ("") where DATA.LABELS is True')}
_NONE = (lambda value, _: not value, "0 where DATA.LABELS is False")
UNLABELLED_RULES: Rules = {
    "DATA.REST": (lambda value, _: value == "drop", "drop where DATA.LABELS is False"),
    **dict.fromkeys(("SOLVER.CE_WEIGHT", "SOLVER.LABEL_SMOOTHING", "DATA.PER_CLASS", "TEACHER.EXPECTED_TOP1"), _NONE),
    "TEACHER.WEIGHTS": (
        lambda value, node: value or node.PRETRAINED,
        "set where DATA.LABELS is False, or TEACHER.PRETRAINED True: images without labels train no teacher",
    ),
}


def load_distill_config(file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return defaults, file and overrides, checked value by value."""
    config = load_config(get_defaults(), file and config_file(file, "distill.yaml"), overrides)
    check_config(config)
    return config


def check_config(config: CfgNode) -> None:
    """Refuse values out of range before anything is read or written; the line names the key."""
    _check(config, _rules_below(""))
    _check(config, LABELLED_RULES if config.DATA.LABELS else UNLABELLED_RULES)
    solver, augment = teacher_solver(config), teacher_augment(config)
    _check(solver, _rules_below("SOLVER."), "TEACHER.SOLVER.")
    _check(augment, _rules_below("DATA.AUGMENT."), "TEACHER.AUGMENT.")
    for key, node in (("DATA.AUGMENT", config.DATA.AUGMENT), ("TEACHER.AUGMENT", augment)):
        if node.SHIFT >= config.DATA.IMAGE_SIZE:
            raise UserError(f"config: {key}.SHIFT must be below DATA.IMAGE_SIZE {config.DATA.IMAGE_SIZE}")
    try:
        for name in config.METHODS:
            parse_method(name)
    except ValueError as error:
        raise UserError(f"METHODS: {error}") from error
    for name, keys in plain(config.TRANSFER.BY_METHOD).items():
        # of methods that aren't among METHODS, too: a call may name fewer than its config
        if _word(name) != name:
            raise UserError(f"config: TRANSFER.BY_METHOD.{name} must be the name of a method, such as kd+nst-poly")
        if not isinstance(keys, dict) or not set(keys) <= set(OWN_KEYS):
            raise UserError(f"config: TRANSFER.BY_METHOD.{name} must be a mapping with {', '.join(OWN_KEYS)} alone")
        transfer_of(config, name)
    check_wandb(config.WANDB, "config")


def _rules_below(prefix: str) -> Rules:
    """Return what the values of the keys may be whose names begin with ``prefix``, by the rest of the name."""
    alone = {name: (lambda value, _, key=key: key.takes(value), key.wanted) for name, key in KEYS.items() if key.wanted}
    return {name.removeprefix(prefix): rule for name, rule in {**alone, **RULES}.items() if name.startswith(prefix)}


def _check(config: CfgNode, rules: Rules, prefix: str = "") -> None:
    for key, (fits, wanted) in rules.items():
        node, *below = config, *key.split(".")
        for part in below[:-1]:
            node = node[part]
        if not fits(node[below[-1]], node):
            raise UserError(f"config: {prefix}{key} must be {wanted}, but is {node[below[-1]]!r}")


def image_roots(config: CfgNode) -> list[tuple[str, str]]:
    """Return the key and the path, as it is written, of each image folder."""
    return [("DATA.ROOT", config.DATA.ROOT), *(("DATA.MORE_ROOTS", root) for root in config.DATA.MORE_ROOTS)]


def teacher_solver(config: CfgNode) -> CfgNode:
    """Return SOLVER with TEACHER.SOLVER's keys put over it."""
    return _overlaid(config.SOLVER, config.TEACHER.SOLVER, "TEACHER.SOLVER")


def teacher_augment(config: CfgNode) -> CfgNode:
    """Return DATA.AUGMENT with TEACHER.AUGMENT's keys put over it."""
    return _overlaid(config.DATA.AUGMENT, config.TEACHER.AUGMENT, "TEACHER.AUGMENT")


def _word(name: str) -> str:
    """Return a method's name as results have it; "" for what is none."""
    try:
        return parse_method(name).word
    except ValueError:
        return ""


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
