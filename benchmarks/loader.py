"""Images a second of stage one's loader on one core, and of evaluation with loader workers.

The loader makes batches from a folder of JPEGs as configs/distill/imagenet_r50_to_r18.yaml augments them (crops of 8 to
100 % of the area, colors, mirror images; 224 pixels).  It is compared with two others, in turns, batch by batch of the
same images, in time of this process on the CPU:

* whole images: all of the image is decoded and made a tensor, then cropped and colored by torchvision's v2
  transforms for uint8 tensors, image by image; the batch is mirrored.  That was this project's loader before.
* torchvision: its reference pipeline on PIL images: RandomResizedCrop, ColorJitter, RandomHorizontalFlip, ToTensor.

What the device that trains does to the pixels (colors, mirror images, normalization) is timed beside it.

Evaluation is that of a student, by default STUDENT.ARCH's, on JPEGs that are not kept in memory: with loader workers
against as it was before, whole images made squares one by one by torchvision; in pairs, by the clock, on as many
threads as there are workers.  The larger the network, the less the images weigh.

    python benchmarks/loader.py --images data/VOC2007/JPEGImages
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2

from nst_det.data.folders import read_image_folder
from nst_det.distillation.accuracy import measure
from nst_det.distillation.augment import ImageStore, draw_moves, move, seen_places
from nst_det.distillation.config import get_defaults, load_distill_config
from nst_det.distillation.dataloader import Batch, EvaluationBatches, Normalizer, TrainingBatches, load_images
from nst_det.engine.device import amp_dtype, default_device, keep_freed_memory
from nst_det.engine.format import text_table
from nst_det.models import create_model

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "distill" / "imagenet_r50_to_r18.yaml"
# times the images a second of the others
GOALS = {"whole images": 3.0, "torchvision": 2.5}
EVALUATION_GOAL = 1.6
OURS = "this loader"


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    config = load_distill_config(CONFIG, ["DATA.ROOT", str(args.images)])
    with tempfile.TemporaryDirectory() as root:
        link_images(args.images, Path(root), args.batch * args.batches)
        result = measure_loaders(Path(root), config.DATA, args.batch, args.batches)
        print_loaders(result)
        torch.set_num_threads(args.workers)
        result["evaluation"] = measure_evaluation(Path(root), config, args)
    print_evaluation(result["evaluation"], args)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    found = [(result["ratios"][name], goal, name) for name, goal in GOALS.items()]
    found.append((result["evaluation"]["ratio"], EVALUATION_GOAL, "the evaluation before"))
    missed = [f"missed: {ratio:.2f} times {name}, {goal} is wanted" for ratio, goal, name in found if ratio < goal]
    print("\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="of the evaluation; and its threads")
    parser.add_argument("--arch", default=get_defaults().STUDENT.ARCH, help="of the evaluation")
    parser.add_argument("--pairs", type=int, default=3, help="of evaluations")
    parser.add_argument("--output", metavar="FILE.json")
    return parser.parse_args()


def link_images(images: Path, root: Path, count: int) -> None:
    """Make an image folder of links; some files stand in for all, where there are fewer."""
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        sys.exit(f"{images}: no JPEGs; name a folder of them")
    (root / "class").mkdir()
    # over the whole folder: neighbors are often alike
    for number in range(count):
        path = files[number * len(files) // count]
        (root / "class" / f"{number:05d}.jpg").symlink_to(path.resolve())


def whole_images(paths: Sequence[Path], step: int, data: CfgNode) -> Tensor:
    """Return a batch (B, 3, S, S) uint8 of whole images that are cropped and colored one by one."""
    augment, size = data.AUGMENT, data.IMAGE_SIZE
    area, aspect = tuple(augment.CROP_AREA), tuple(augment.CROP_ASPECT)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=area, ratio=aspect, antialias=True),
            v2.ColorJitter(*augment.COLOR_JITTER),
        ]
    )
    made = []
    with torch.random.fork_rng(devices=[]):
        for slot, path in enumerate(paths):
            torch.default_generator.manual_seed(1000 * step + slot)
            image = Image.open(path)
            image.getexif()
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
            made.append(transform(pixels))
    return move(torch.stack(made), seen_places(*draw_moves(len(paths), augment, step), size))


def torchvision_reference(paths: Sequence[Path], data: CfgNode) -> Tensor:
    """Return a batch (B, 3, S, S) float32 as torchvision's references make it; it is not normalized yet."""
    augment = data.AUGMENT
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(data.IMAGE_SIZE, tuple(augment.CROP_AREA), tuple(augment.CROP_ASPECT)),
            v1.ColorJitter(*augment.COLOR_JITTER),
            v1.RandomHorizontalFlip(augment.HFLIP),
            v1.ToTensor(),
        ]
    )
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def decode(paths: Sequence[Path]) -> None:
    """Decode whole images, and no more."""
    for path in paths:
        Image.open(path).convert("RGB")


def measure_loaders(root: Path, data: CfgNode, size: int, count: int) -> dict[str, Any]:
    """Return the milliseconds an image of each pipeline, and how many times as many images ours makes."""
    split = read_image_folder(root, val_fraction=0).train
    store = ImageStore(split, data.IMAGE_SIZE, data.CROP_RATIO, square=False, limit=0)
    batches = TrainingBatches(store, size, 0, data.AUGMENT)
    device = default_device()
    normalize = Normalizer(data.MEAN, data.STD, device)
    last: list[Batch] = []

    def ours(step: int) -> None:
        last[:] = [batches[step]]

    def on_device(step: int) -> None:
        normalize(last[0].images, last[0].changes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def paths(step: int) -> list[Path]:
        return [split.path(index) for index in batches.rows(step).tolist()]

    pipelines: dict[str, Callable[[int], Any]] = {
        OURS: ours,
        f"its pixels, on {device}": on_device,
        "whole images": lambda step: whole_images(paths(step), step, data),
        "torchvision": lambda step: torchvision_reference(paths(step), data),
        "decoding whole images alone": lambda step: decode(paths(step)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    # the first batch warms up
    for step in [0, *range(count)]:
        for name, pipeline in pipelines.items():
            # a GPU computes while this process waits
            clock = time.perf_counter if device.type == "cuda" and pipeline is on_device else time.process_time
            start = clock()
            pipeline(step)
            seconds[name].append((clock() - start) / size)
    seconds = {name: values[1:] for name, values in seconds.items()}
    ratios = {
        name: statistics.median(other / own for other, own in zip(seconds[name], seconds[OURS])) for name in GOALS
    }
    return {"milliseconds": {name: 1000 * statistics.median(all_) for name, all_ in seconds.items()}, "ratios": ratios}


def print_loaders(result: dict[str, Any]) -> None:
    rows = []
    for name, milliseconds in result["milliseconds"].items():
        ratio = f"{result['ratios'][name]:.2f} (at least {GOALS[name]})" if name in GOALS else ""
        rows.append((name, f"{milliseconds:.3f}", f"{1000 / milliseconds:.0f}", ratio))
    print(text_table(("one core", "ms an image", "images/s", "this loader makes times as many"), rows))


class WholeSquares(ImageStore):
    """The images of an evaluation, made squares as before."""

    def squares(self, indices: Tensor) -> Tensor:
        whole = [np.array(Image.open(self.split.path(index)).convert("RGB")) for index in indices.tolist()]
        square = v2.Compose([v2.Resize(round(self.size / self.crop_ratio)), v2.CenterCrop(self.size)])
        return torch.stack([square(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()) for pixels in whole])


def measure_evaluation(root: Path, config: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Return the images a second before and with workers, and the median ratio of pairs; both find the same."""
    data, device = config.DATA, default_device()
    split = read_image_folder(root, val_fraction=0).train
    normalize, precision = Normalizer(data.MEAN, data.STD, device), amp_dtype(config.SOLVER.AMP, device)
    model = create_model(args.arch, 1000).to(device).to(memory_format=torch.channels_last)
    firsts = range(0, len(split), config.TEST.IMS_PER_BATCH)
    kinds = {"before": (WholeSquares, 0), "with workers": (ImageStore, args.workers)}
    config = config.clone()
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    accuracies = []
    for _ in range(1 + args.pairs):
        for name, (kind, workers) in kinds.items():
            config.merge_from_list(["DATALOADER.NUM_WORKERS", workers])
            threads = workers if device.type == "cpu" else 1
            store = kind(split, data.IMAGE_SIZE, data.CROP_RATIO, square=True, limit=0, threads=threads)
            batches = load_images(EvaluationBatches(store, config.TEST.IMS_PER_BATCH), firsts, config, device)
            start = time.perf_counter()
            accuracies.append(measure({"": model}, batches, normalize, precision)[""])
            rates[name].append(len(split) / (time.perf_counter() - start))
    if any(found != accuracies[0] for found in accuracies):
        sys.exit(f"evaluations differ: {accuracies}")
    # the first pair warms up
    rates = {name: values[1:] for name, values in rates.items()}
    ratio = statistics.median(new / old for old, new in zip(*rates.values()))
    return {"images_per_second": {name: statistics.median(values) for name, values in rates.items()}, "ratio": ratio}


def print_evaluation(result: dict[str, Any], args: argparse.Namespace) -> None:
    rows = [(name, f"{rate:.0f}") for name, rate in result["images_per_second"].items()]
    print(text_table((f"evaluation of {args.arch}, {args.workers} workers", "images/s"), rows))
    print(f"{result['ratio']:.2f} times as many (at least {EVALUATION_GOAL})")


if __name__ == "__main__":
    sys.exit(main())
