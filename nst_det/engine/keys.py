"""How the keys of a config are declared, each with its default and its meaning, and those that both stages share."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

AMP_DTYPES = ("auto", "bf16", "fp16")
FLOAT32_PRECISIONS = ("", "highest", "high", "medium")
# of COMPILE
OFF, *_ = COMPILE_MODES = ("off", "default", "reduce-overhead", "max-autotune")
CUDA_GRAPHS = COMPILE_MODES[2:]
# of CLIP_GRADIENTS.CLIP_TYPE; the first two are Detectron2's
FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)
# of NON_FINITE.POLICY
STOP, SKIP, BACK = POLICIES = ("stop", "skip", "back")


class Key(NamedTuple):
    """A key of a config: its default ({} takes any keys), its meaning, and what it takes, if not all of its type."""

    default: Any
    meaning: str
    wanted: str = ""
    takes: Callable[[Any], bool] = lambda _: True


def one_of(meaning: str, *values: Any, default: Any = None) -> Key:
    """Limit a key to some values; the first is the default, unless that is none of them."""
    wanted = " or ".join(map(repr, values))
    return Key(values[0] if default is None else default, meaning, wanted, values.__contains__)


def at_least(meaning: str, least: float, default: float) -> Key:
    """Limit a key to numbers from ``least`` on."""
    return Key(default, meaning, f"at least {least}", lambda value: value is not None and bool(value >= least))


def below_one(meaning: str, name: str, example: float) -> Key:
    """Limit a key to numbers from 0, the default, to below 1."""
    wanted = f"0 for no {name}, or a fraction below 1 such as {example}"
    return Key(0.0, meaning, wanted, lambda value: 0 <= value < 1)


def are_numbers(values: Any, count: int) -> bool:
    """Return whether there are so many values, all of them finite numbers."""
    return len(values) == count and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


# what is wanted of a value, and whether it is so
ABOVE_0_TO_1 = ("above 0 and at most 1", lambda value: 0 < value <= 1)
FROM_0_TO_1 = ("from 0 to 1", lambda value: 0 <= value <= 1)


def config_tree(keys: Mapping[str, Key], config: CfgNode | None = None) -> CfgNode:
    """Return the config of dotted keys with their defaults; ``config`` takes them, if it is given."""
    config = CfgNode() if config is None else config
    # a config of Detectron2 merges files only into nodes of its own class
    kind = type(config)
    for key, (default, *_) in keys.items():
        *groups, name = key.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, kind())
        node[name] = kind(copy.deepcopy(default), new_allowed=True) if isinstance(default, dict) else copy.copy(default)
    return config


# of both stages
FLOAT32_PRECISION = one_of(
    "of float32 on a GPU, in convolutions and matrix products alike: highest is float32; high and medium "
    "are TF32, which "
    'is faster and rounds factors to 11 bits, those of transfer losses too; "" is torch\'s own (TF32 in convolutions, '
    "float32 in products, but TF32 in the gradient of NST on bf16 or fp16 maps); what SOLVER.AMP computes in bf16 or "
    "fp16 is not float32",
    *FLOAT32_PRECISIONS,
)
CUDNN_BENCHMARK = Key(
    False,
    "with a GPU: let cuDNN try its kernels at each new size of a training batch (seconds), and keep the fastest",
)
COMPILE = one_of(
    "mode of torch.compile for what trains: students and teacher of stage one, in stage two backbones and FPNs for the "
    "sizes of INPUT.PADDED_SIZES (torchvision engine); the last two make CUDA graphs, and need a GPU; what can't be "
    "compiled runs as it is, after one line; sums are rounded, and dropout drawn, differently than with off",
    *COMPILE_MODES,
)
TRUST_PICKLE = Key(
    False, "open weights that are pickles with more than tensors in them, which can run code; --trust-pickle sets it"
)
TENSORBOARD = Key(False, "write TensorBoard events into the run folder")
WANDB = Key("", 'a project at Weights & Biases (pip install wandb); "" for none')
CLIP_TYPE = "value clips each entry, norm each parameter's norm, full_model that of all gradients together"
EMA_DECAY = below_one(
    "of an exponential moving average of the weights, which is then what is validated and written", "average", 0.999
)
TRANSFER_KEYS = {
    "LEVELS": Key([], "feature levels of the student, such as res3, or student:teacher, such as res3:res4"),
    "WEIGHTS": Key({}, "by term, such as {at: 10.0}; without it, and none in the method (at:10), the term's default"),
    "TERM_LEVELS": Key({}, "levels of a single term, such as {fitnet: [res4]}"),
    "OPTIONS": Key({}, "options of a term, such as {kd: {temperature: 2.0}}; nst-det methods lists them"),
    "AUTO_WEIGHT": Key(
        {},
        "by term: the wanted ratio of its gradient norm to the task's; the first steps choose the weight that gives it",
    ),
    "WARMUP_ITERS": Key(0, "steps in which the weights rise linearly"),
}

NON_FINITE_KEYS = {
    "POLICY": one_of(
        "where a loss or gradient isn't finite: stop, skip the step, or roll back (back) to the last checkpoint",
        *POLICIES,
    ),
    "LIMIT": at_least("how often a step may be skipped or rolled back in one run", 1, default=3),
    "LR_FACTOR": Key(0.5, "by which the learning rate is multiplied when it is rolled back", *ABOVE_0_TO_1),
}
