import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nst_det.cli import main
from nst_det.engine.metrics import read_metrics
from nst_det.models import Card, create_model, input_contract, save_backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command logs to the standard error of its test, which is closed after it."""
    yield
    for name in (None, "nst_det", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in [item for item in logger.handlers if isinstance(item, logging.StreamHandler)]:
            logger.removeHandler(handler)


@pytest.fixture(scope="session")
def command() -> Callable[..., int]:
    """``command("--config-file", path, ...)``: the exit code of ``nst-det train-det`` with these words."""

    def run(*words: object) -> int:
        with pytest.raises(SystemExit) as left:
            main(["train-det", *map(str, words)])
        return left.value.code

    return run


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbone files r18, r50, small and mobile with batch statistics that are not those of a new network."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for name, arch in (
        ("r18", "resnet18"),
        ("r50", "resnet50"),
        ("small", "nst_resnet10_w32"),
        ("mobile", "mobilenetv3_small_050"),
    ):
        model = create_model(arch, 5)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
                torch.nn.init.uniform_(layer.weight, 0.5, 1.0)
        card = Card(arch=arch, num_classes=5, input=input_contract(MEAN, STD, "RGB", 64), method="nst-poly")
        save_backbone(folder / f"{name}.safetensors", model, card)
    return folder


@pytest.fixture(autouse=True)
def _named_registry(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NST_DET_BACKBONES", str(registry))


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images with bright squares and dark bars; ``train`` has 8, ``test`` 4, one object is difficult."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(12):
        width, height = (96, 64) if index % 3 else (64, 96)
        image = draw.integers(90, 140, (height, width, 3), dtype=np.uint8)
        objects = []
        for number in range(2):
            name, (w, h), color = (("square", (24, 24), 250), ("bar", (36, 12), 10))[(index + number) % 2]
            x, y = int(draw.integers(1, width - w)), int(draw.integers(1, height - h))
            image[y - 1 : y + h - 1, x - 1 : x + w - 1] = color
            hard = int(index == 9 and number == 1)
            objects.append(
                f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
                f"<difficult>{hard}</difficult><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
                f"<xmax>{x + w - 1}</xmax><ymax>{y + h - 1}</ymax></bndbox></object>"
            )
        Image.fromarray(image).save(root / "JPEGImages" / f"i{index:02d}.jpg", quality=95)
        (root / "Annotations" / f"i{index:02d}.xml").write_text(
            f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
            f"{''.join(objects)}</annotation>"
        )
    ids = [f"i{index:02d}" for index in range(12)]
    (root / "ImageSets/Main/train.txt").write_text("\n".join(ids[:8]) + "\n")
    (root / "ImageSets/Main/test.txt").write_text("\n".join(ids[8:]) + "\n")
    return root


@pytest.fixture(scope="session")
def tiny_yaml(voc_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for the folder above: a small student with FPN, six steps of two images."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(
        f"""\
ENGINE: detectron2
SEED: 3
INPUT: {{FORMAT: RGB, MIN_SIZE_TRAIN: [56, 64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}}
DATASETS:
  TRAIN: [tiny_train]
  TEST: [tiny_test]
  VOC:
    tiny_train: {{ROOT: "{voc_root}", SPLIT: train}}
    tiny_test: {{ROOT: "{voc_root}", SPLIT: test}}
DATALOADER: {{NUM_WORKERS: 0}}
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: GeneralizedRCNN
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {{NAME: build_timm_fpn_backbone, FREEZE_AT: 0}}
  TIMM: {{ARCH: nst_resnet10_w32, NORM: BN}}
  FPN: {{IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}}
  ANCHOR_GENERATOR: {{SIZES: [[12], [24], [36], [48], [64]]}}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    BATCH_SIZE_PER_IMAGE: 32
    PRE_NMS_TOPK_TRAIN: 60
    POST_NMS_TOPK_TRAIN: 40
  ROI_HEADS: {{NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 0, BATCH_SIZE_PER_IMAGE: 16}}
  ROI_BOX_HEAD:
    NAME: FastRCNNConvFCHead
    NUM_FC: 2
    FC_DIM: 32
    POOLER_RESOLUTION: 5
    CANONICAL_BOX_SIZE: 28
    CANONICAL_LEVEL: 3
SOLVER:
  OPTIMIZER: ADAMW
  IMS_PER_BATCH: 2
  BASE_LR: 0.002
  WARMUP_ITERS: 0
  MAX_ITER: 6
  STEPS: [5]
  CHECKPOINT_PERIOD: 3
VERSION: 2
"""
    )
    return path


@pytest.fixture(scope="session")
def whole(command: Callable[..., int], tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of it, without evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("--config-file", tiny_yaml, "DATASETS.TEST", "[]", "OUTPUT_DIR", folder) == 0
    return folder


@pytest.fixture(scope="session")
def same_run() -> Callable[[Path, Path], None]:
    """``same_run(one, other)``: two run folders hold the same weights and metrics, to the bit."""

    def check(one: Path, other: Path) -> None:
        first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")

    return check


@pytest.fixture(scope="session")
def tiny_teacher(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher's config (wider than the student's) and its weights, random but saved."""
    pytest.importorskip("detectron2")
    from detectron2.modeling import build_model

    from nst_det.detectron2.config import load_config, register_datasets

    folder = tmp_path_factory.mktemp("teacher")
    config = folder / "teacher.yaml"
    config.write_text(f"_BASE_: {tiny_yaml}\nMODEL:\n  TIMM: {{ARCH: nst_resnet18_w48}}\n  FPN: {{OUT_CHANNELS: 24}}\n")
    cfg = load_config(config)
    register_datasets(cfg)
    torch.manual_seed(7)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "teacher.pth")
    return config, folder / "teacher.pth"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``poisoned(step, times)``: a loss is no number in the next run's step, so many times."""
    from nst_det.detectron2.hooks import FiniteCheck

    def poison(step: int, times: int = 1) -> None:
        see, left = FiniteCheck.see_losses, [step] * times

        def poisoned_losses(self, model, inputs, losses):
            if self.trainer.iter in left:
                left.remove(self.trainer.iter)
                with torch.no_grad():
                    losses["loss_cls"].mul_(math.nan)
            see(self, model, inputs, losses)

        monkeypatch.setattr(FiniteCheck, "see_losses", poisoned_losses)

    return poison
