"""What decides between FitNet and NST: levels, weights, maps before or after the ReLU, centering, length of training.

Students of the demo's size on the generated shapes, judged by top-1 on images cut from the training split.  What is
done is not done again, so a stopped study goes on; the table is printed from what is there.

    python benchmarks/fitnet_against_nst.py --output output/study            all of it: about 30 minutes of one core
    python benchmarks/fitnet_against_nst.py --output output/study weights    one part of it
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import register_model
from timm.models.resnet import ResNet
from torch import Tensor, nn

from nst_det.data.synthetic import CLASSIFICATION, GenerateSettings, generate_data
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.engine.device import keep_freed_memory
from nst_det.engine.io import write_json
from nst_det.engine.progress import start_logging
from nst_det.models.small import SmallStemResNet

CONFIG = Path(__file__).with_suffix(".yaml")
SETTINGS = GenerateSettings(
    seed=0, classification_images=9600, classification_val_images=1200, detection_images=300, detection_test_images=200
)
BOTH = ["res3", "res4"]


class BeforeReLU(SmallStemResNet):
    """The small network, the same function, whose maps are what enters the last ReLU of each stage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage in stages:
            stage[-1].act2 = nn.Identity()
        for stage in stages[1:]:
            stage.register_forward_pre_hook(_rectified)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x.relu(), pre_logits)


def _rectified(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].relu(),)


@register_model
def study_resnet10_w32(pretrained: bool = False, num_classes: int = 1000, **_: Any) -> ResNet:
    """``nst_resnet10_w32`` with maps before the ReLU."""
    return BeforeReLU((1, 1, 1, 1), 32, num_classes=num_classes)


@register_model
def study_resnet18_w48(pretrained: bool = False, num_classes: int = 1000, **_: Any) -> ResNet:
    """``nst_resnet18_w48`` with maps before the ReLU."""
    return BeforeReLU((2, 2, 2, 2), 48, num_classes=num_classes)


@dataclass(frozen=True)
class Setting:
    """Students that train side by side: one teacher pass feeds them all."""

    name: str
    methods: Sequence[str]
    levels: Sequence[str] = field(default_factory=lambda: BOTH)
    steps: int = 200
    seeds: Sequence[int] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    before_relu: bool = False
    teacher_steps: int = 400


MAIN = ["ce", "kd:1", "at:10", "fitnet:30", "nst-poly:100"]
PARTS = {
    "weights": [
        Setting("main", MAIN, seeds=(0, 1, 2)),
        Setting(
            "weights",
            ["kd:0.3", "kd:3", "at:1", "at:100", "fitnet:3", "fitnet:300", "nst-poly:10", "nst-poly:1000"],
        ),
    ],
    "others": [
        Setting(
            "others",
            [
                *("at:300", "at:1000", "at:3000", "kd:10", "kd:30", "vid:0.1", "vid:1", "vid:10"),
                *("lp:1", "lp:10", "lp:100", "nst-linear:100", "nst-linear:1000", "nst-gaussian:100"),
            ],
        ),
        Setting(
            "more weights",
            [
                *("at:30", "vid:30", "vid:100", "lp:0.001", "lp:0.01", "lp:0.1"),
                *("nst-linear:10", "nst-linear:30", "nst-gaussian:30", "nst-gaussian:300"),
            ],
        ),
    ],
    "levels": [
        Setting("res3", ["fitnet:30", "nst-poly:100"], ["res3"]),
        Setting("res4", ["fitnet:30", "fitnet:100", "nst-poly:100", "nst-poly:300"], ["res4"]),
        Setting("res5", ["fitnet:30", "nst-poly:100"], ["res5"]),
        Setting("res3 to res5", ["fitnet:30", "nst-poly:100"], ["res3", "res4", "res5"]),
    ],
    "maps": [
        Setting("centered", ["nst-poly:100"], seeds=(0, 1), options={"nst-poly": {"center": True}}),
        Setting(
            "fitnet through BN and ReLU", ["fitnet:30"], seeds=(0, 1), options={"fitnet": {"regressor": "conv-bn-relu"}}
        ),
        Setting("before the ReLU", ["fitnet:30", "nst-poly:100"], seeds=(0, 1), before_relu=True),
        Setting(
            "before the ReLU, centered",
            ["nst-poly:100"],
            seeds=(0, 1),
            options={"nst-poly": {"center": True}},
            before_relu=True,
        ),
    ],
    "teacher": [
        Setting(
            "teacher of 750 steps",
            ["ce", "kd:1", "at:100", "fitnet:30", "nst-poly:100"],
            seeds=(0, 1),
            teacher_steps=750,
        ),
        Setting(
            "teacher of 750 steps, centered",
            ["nst-poly:100"],
            seeds=(0, 1),
            options={"nst-poly": {"center": True}},
            teacher_steps=750,
        ),
    ],
    "length": [
        Setting("100 steps", MAIN, steps=100, seeds=(0, 1)),
        Setting("400 steps", MAIN, steps=400, seeds=(0, 1)),
        Setting("800 steps", ["ce", "fitnet:30", "nst-poly:100"], steps=800),
    ],
}


def teacher(output: Path, shared: Sequence[str], steps: int) -> tuple[Path, Path]:
    """A teacher of so many steps: its backbone file, and its weights alone, which any network with these keys takes."""
    name = "teacher" if steps == 400 else f"teacher{steps}"
    words = [*shared, "OUTPUT_DIR", str(output / name), "METHODS", "[]", "TEACHER.SOLVER.MAX_ITER", str(steps)]
    found = distill(load_distill_config(CONFIG, [*words, *(["NAME", f"shapes-{steps}"] if steps != 400 else [])]))
    bare = output / f"{name}.safetensors"
    shutil.copyfile(found["teacher"]["backbone"], bare)
    return Path(found["teacher"]["backbone"]), bare


def study(output: Path, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Train what is not done, one row a method of each setting."""
    data = generate_data(output / "data", SETTINGS)
    shared = ["DATA.ROOT", str(data / CLASSIFICATION), "DATA.VAL_FROM", "train", "DATA.VAL_FRACTION", "0.125"]
    shared += ["REGISTRY", str(output / "backbones"), "TEST.EVAL_PERIOD", "0"]
    for setting in (setting for part in parts for setting in PARTS[part]):
        weights, bare = teacher(output, shared, setting.teacher_steps)
        found: dict[str, list[float]] = {}
        for seed in setting.seeds:
            words = [*shared, "OUTPUT_DIR", str(output / setting.name.replace(" ", "_") / f"seed{seed}")]
            words += ["NAME", f"{setting.name.replace(' ', '-').replace(',', '')}", "SEED", str(seed)]
            words += ["METHODS", str(list(setting.methods)), "TRANSFER.LEVELS", str(list(setting.levels))]
            words += ["SOLVER.MAX_ITER", str(setting.steps), "TRANSFER.OPTIONS", json.dumps(setting.options)]
            words += ["TEACHER.WEIGHTS", str(bare if setting.before_relu else weights)]
            if setting.before_relu:
                words += ["STUDENT.ARCH", "study_resnet10_w32", "TEACHER.ARCH", "study_resnet18_w48"]
            for method, result in distill(load_distill_config(CONFIG, words)).items():
                if method != "teacher":
                    found.setdefault(method, []).append(result["top1"])
        for method, top1 in found.items():
            yield {"setting": setting.name, "steps": setting.steps, "method": method, "top1": top1}


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all without one")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    start_logging()
    keep_freed_memory()
    rows = []
    print("| setting | steps | method | top-1 by seed | mean |\n|---|---:|---|---|---:|")
    for row in study(args.output, args.parts or list(PARTS)):
        rows.append(row)
        seeds = " ".join(f"{value:.3f}" for value in row["top1"])
        mean = statistics.mean(row["top1"])
        print(f"| {row['setting']} | {row['steps']} | {row['method']} | {seeds} | {mean:.3f} |", flush=True)
    write_json(args.output / "study.json", rows)


if __name__ == "__main__":
    main()
