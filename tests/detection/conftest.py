from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode

from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.config import load_detect_config
from nst_det.detection.data import data_classes
from nst_det.detection.torchvision import build_detector
from nst_det.detection.torchvision.backbone import Shape
from nst_det.detection.torchvision.roi_heads import RoiHeads

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detect"

# a detector that trains in milliseconds, and still has every part
SMALL: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.TIMM.ARCH": "nst_resnet10_w32",
    "MODEL.TIMM.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[12], [24], [48], [72], [96]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.01,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 5,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 1,
    "MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE": 56,
    "MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL": 3,
    "DATALOADER.NUM_WORKERS": 0,
    "INPUT.MIN_SIZE_TRAIN": [96],
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 96,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": [],
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "SEED": 0,
}


# more anchors and proposals than there are: both engines take all of them, and nothing is drawn
EXHAUSTIVE: dict[str, Any] = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}


def words(values: dict[str, Any]) -> list[str]:
    return [text for key, value in values.items() for text in (key, str(value))]


@pytest.fixture(scope="session")
def small_words() -> Callable[..., list[str]]:
    """``KEY VALUE`` pairs of the small detector, with other values on top."""
    return lambda changes=None: words({**SMALL, **(changes or {})})


@pytest.fixture(scope="session")
def small(small_words) -> Callable[..., CfgNode]:
    """The config of the small detector, with other values on top."""
    return lambda changes=None: load_detect_config(CONFIGS / "base_rcnn_fpn.yaml", small_words(changes))


@pytest.fixture(scope="session")
def exhaustive() -> dict[str, Any]:
    """Changes with which the two engines, which draw differently, take the same anchors and proposals."""
    return EXHAUSTIVE


@pytest.fixture(scope="session")
def base_file() -> Path:
    return CONFIGS / "base_rcnn_fpn.yaml"


@pytest.fixture
def talkative(small):
    """A small detector whose heads say something else for every box, as trained ones do; its config on request."""

    def build(changes=None):
        detector = build_detector(small(changes), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if parameter.ndim > 1 and any(part in name for part in ("rpn_head", "box_predictor")):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return detector

    return build


@pytest.fixture
def roi_heads(small):
    """RoI heads on one level, of two classes."""

    def build(**changes):
        settings = {
            "MODEL.ROI_HEADS.NUM_CLASSES": 2, "MODEL.ROI_HEADS.IN_FEATURES": ["p2"],
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64, "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 2.0,
        }  # fmt: skip
        return RoiHeads(
            small(settings | {f"MODEL.{x if '.' in x else f'ROI_HEADS.{x}'}": value for x, value in changes.items()}),
            {"p2": Shape(channels=16, stride=4)},
        )

    return build


@pytest.fixture(scope="session")
def batch() -> list[dict[str, Any]]:
    """Three images of different sizes with 3, 1 and 0 objects."""
    generator = torch.Generator().manual_seed(2)
    images = []
    for height, width, count in ((70, 96, 3), (96, 81, 1), (64, 64, 0)):
        corner = torch.rand(count, 2, generator=generator) * 30
        size = torch.rand(count, 2, generator=generator) * 30 + 4
        images.append(
            {
                "image": (torch.rand(3, height, width, generator=generator) * 255).to(torch.uint8),
                "height": 2 * height + 1,
                "width": 2 * width,
                "image_id": f"{height}x{width}",
                "boxes": torch.cat((corner, corner + size), dim=1),
                "labels": torch.randint(0, 3, (count,), generator=generator),
            }
        )
    return images


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A generated VOC folder with 12 training and 4 test images of 8 classes."""
    settings = GenerateSettings(
        classification_images=10, classification_val_images=10, detection_images=12, detection_test_images=4
    )
    return generate_data(tmp_path_factory.mktemp("generated") / "data", settings, workers=1) / DETECTION


@pytest.fixture
def on_shapes(small, shapes, tmp_path):
    """The small detector's config on the generated folder, writing to ``tmp_path / name``."""

    def config(name: str = "run", changes=None):
        return small(
            {
                "MODEL.ROI_HEADS.NUM_CLASSES": 0,
                "DATASETS.VOC": {
                    "shapes_trainval": {"ROOT": str(shapes), "SPLIT": "trainval"},
                    "shapes_test": {"ROOT": str(shapes), "SPLIT": "test"},
                },
                "DATASETS.TRAIN": ["shapes_trainval"],
                "DATASETS.TEST": ["shapes_test"],
                "OUTPUT_DIR": str(tmp_path / name),
                **(changes or {}),
            }
        )

    return config


@pytest.fixture
def untrained_teacher(on_shapes, tmp_path):
    """Writes a teacher detector for that folder, drawn by chance, and gives the keys that name it."""

    def keys(changes=None):
        config = on_shapes("teacher", {"MODEL.ROI_HEADS.NUM_CLASSES": 8, **(changes or {})})
        save_weights(tmp_path / "teacher.safetensors", build_detector(config, 7), data_classes(config))
        (tmp_path / "teacher.yaml").write_text(config.dump())
        return {
            "TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
            "TEACHER.WEIGHTS": str(tmp_path / "teacher.safetensors"),
        }

    return keys


@pytest.fixture
def taught(untrained_teacher):
    """Keys of a student with terms on two levels, which that teacher teaches."""
    return {"METHOD": "fitnet:1+nst-poly:1", "TRANSFER.LEVELS": ["p2", "p3"], **untrained_teacher()}
