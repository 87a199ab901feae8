import logging
import math
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from nst_det.data.annotation import VocAnnotation, VocObject, voc_xml
from nst_det.engine.metrics import read_metrics
from nst_det.models import Card, create_model, input_contract, save_backbone
from tests.helpers.detection import same_bits

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ARCHS = {
    "r18": "resnet18",
    "r50": "resnet50",
    "small": "nst_resnet10_w32",
    "mobile": "mobilenetv3_small_050",
}
# a small student with FPN, six steps of two images
TINY = """\
_BASE_: {base}
ENGINE: detectron2
SEED: 3
INPUT: {{MIN_SIZE_TRAIN: [56, 64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}}
DATASETS:
  TRAIN: [tiny_train]
  TEST: [tiny_test]
  VOC:
    tiny_train: {{ROOT: "{root}", SPLIT: train}}
    tiny_test: {{ROOT: "{root}", SPLIT: test}}
DATALOADER: {{NUM_WORKERS: 0}}
MODEL:
  DEVICE: cpu
  BACKBONE: {{FREEZE_AT: 0}}
  TIMM: {{ARCH: nst_resnet10_w32, NORM: BN}}
  FPN: {{OUT_CHANNELS: 16}}
  ANCHOR_GENERATOR: {{SIZES: [[12], [24], [36], [48], [64]]}}
  RPN: {{BATCH_SIZE_PER_IMAGE: 32, PRE_NMS_TOPK_TRAIN: 60, POST_NMS_TOPK_TRAIN: 40}}
  ROI_HEADS: {{BATCH_SIZE_PER_IMAGE: 16}}
  ROI_BOX_HEAD: {{FC_DIM: 32, POOLER_RESOLUTION: 5, CANONICAL_BOX_SIZE: 28, CANONICAL_LEVEL: 3}}
SOLVER:
  OPTIMIZER: ADAMW
  IMS_PER_BATCH: 2
  BASE_LR: 0.002
  WARMUP_ITERS: 0
  MAX_ITER: 6
  STEPS: [5]
  CHECKPOINT_PERIOD: 3
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging():
    """The command logs to the standard error of its test, which is closed after it."""
    yield
    for name in ("nst_det", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [item for item in logger.handlers if not isinstance(item, logging.StreamHandler)]


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    """Backbone files r18, r50, small and mobile with batch statistics that are not those of a new network."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for name, arch in ARCHS.items():
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
def _named_registry(registry, monkeypatch):
    monkeypatch.setenv("NST_DET_BACKBONES", str(registry))


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory):
    """12 images with bright squares and dark bars; ``train`` has 8, ``test`` 4, one object is difficult."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    draw = np.random.default_rng(0)
    ids = [f"i{index:02d}" for index in range(12)]
    for index, id_ in enumerate(ids):
        width, height = (96, 64) if index % 3 else (64, 96)
        image = draw.integers(90, 140, (height, width, 3), dtype=np.uint8)
        objects = []
        for number in range(2):
            name, (w, h), color = (("square", (24, 24), 250), ("bar", (36, 12), 10))[(index + number) % 2]
            x, y = int(draw.integers(1, width - w)), int(draw.integers(1, height - h))
            image[y - 1 : y + h - 1, x - 1 : x + w - 1] = color
            objects.append(VocObject(name, (x, y, x + w - 1, y + h - 1), difficult=index == 9 and number == 1))
        Image.fromarray(image).save(root / "JPEGImages" / f"{id_}.jpg", quality=95)
        annotation = VocAnnotation(id_, width, height, tuple(objects))
        (root / "Annotations" / f"{id_}.xml").write_text(voc_xml(annotation, f"{id_}.jpg"))
    for split, part in (("train", ids[:8]), ("test", ids[8:])):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(part) + "\n")
    return root


@pytest.fixture(scope="session")
def tiny_yaml(voc_root, tmp_path_factory, pytestconfig):
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    base = pytestconfig.rootpath / "configs" / "detect" / "base_rcnn_fpn.yaml"
    path.write_text(TINY.format(base=base, root=voc_root))
    return path


@pytest.fixture
def configured(tiny_yaml, tmp_path):
    """``configured("KEY", value, ...)``: the tiny config, its data sets registered, for the folder ``run``."""
    from nst_det.detectron2.config import load_config, register_datasets

    def configure(*words, file=tiny_yaml, folder=tmp_path / "run"):
        cfg = load_config(file, [str(word) for word in (*words, "OUTPUT_DIR", folder)])
        register_datasets(cfg)
        return cfg

    return configure


@pytest.fixture(scope="session")
def train(cli, tiny_yaml):
    """``train(folder, "KEY", value, ..., flags=["--resume"])``: the command's exit code; with ``test`` it evaluates."""

    def run(folder, *words, flags=(), test=False, file=tiny_yaml):
        untested = [] if test else ["DATASETS.TEST", "[]"]
        return cli("train-det", "--config-file", file, *flags, *untested, "OUTPUT_DIR", folder, *words)

    return run


@pytest.fixture(scope="session")
def whole(train, tmp_path_factory):
    """The folder of an undisturbed run of it, without evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="session")
def same_run():
    """``same_run(one, other)``: two run folders hold the same weights and metrics, to the bit."""

    def check(one, other):
        assert same_bits(one, other)
        assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")

    return check


@pytest.fixture(scope="session")
def tiny_teacher(tiny_yaml, tmp_path_factory):
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
    return str(config), str(folder / "teacher.pth")


@pytest.fixture
def taught(tiny_teacher):
    """``taught(method, levels)``: the words of a config that learns from that teacher."""

    def words(method="nst-poly", levels=("p2", "p3", "p4", "p5"), teacher=tiny_teacher):
        named = ["TEACHER.CONFIG_FILE", teacher[0], "TEACHER.WEIGHTS", teacher[1]]
        return ["METHOD", method, "TRANSFER.LEVELS", str(list(levels)), *named]

    return words


@pytest.fixture
def at_step(monkeypatch):
    """``with at_step(step, act):`` trainers call ``act(trainer)`` before that step; of several, the one of ``rank``."""
    from detectron2.utils import comm

    from nst_det.detectron2 import DistillTrainer

    @contextmanager
    def disturbed(step, act, rank=0):
        run_step = DistillTrainer.run_step

        def disturbed_step(self):
            if self.iter == step and comm.get_rank() == rank:
                act(self)
            run_step(self)

        with monkeypatch.context() as patch:
            patch.setattr(DistillTrainer, "run_step", disturbed_step)
            yield

    return disturbed


@pytest.fixture
def poisoned(monkeypatch):
    """``poisoned(step, ...)``: a loss is not finite in each of these steps, once; of several processes, in ``rank``."""
    from detectron2.utils import comm

    from nst_det.detectron2.trainer import FiniteCheck

    def poison(*steps, rank=0):
        see, left = FiniteCheck.see_losses, list(steps)

        def poisoned_losses(self, model, inputs, losses):
            if self.trainer.iter in left and comm.get_rank() == rank:
                left.remove(self.trainer.iter)
                with torch.no_grad():
                    losses["loss_cls"].mul_(math.nan)
            see(self, model, inputs, losses)

        monkeypatch.setattr(FiniteCheck, "see_losses", poisoned_losses)

    return poison


# what a Detectron2 without this project makes of a config and weights
PLAIN = """
import sys, torch
sys.modules["nst_det"] = None  # an import of it would fail
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.MODEL.DEVICE = "cpu"
model = build_model(cfg).eval()
checkpointer = DetectionCheckpointer(model)
keys = []
checkpointer._log_incompatible_keys = keys.append
checkpointer.load(sys.argv[2])
images = torch.load(sys.argv[3])
with torch.no_grad():
    maps = model.backbone.bottom_up(images)
    scores = model([{"image": images[0]}])[0]["instances"].scores
found = {"missing": keys[0].missing_keys, "unexpected": keys[0].unexpected_keys, "maps": maps, "scores": scores}
torch.save({**found, "format": model.input_format}, sys.argv[3])
"""


@pytest.fixture
def plain_detectron2(tmp_path):
    """``plain_detectron2(config, weights, images)``: what :data:`PLAIN` finds, where the checkout is out of reach."""

    def run(config, weights, images):
        torch.save(images, tmp_path / "given.pt")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-c", PLAIN, *map(str, (config, weights, tmp_path / "given.pt"))]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / "given.pt")

    return run
