import pytest
import torch

from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data
from nst_det.data.voc import VocDataset
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.config import load_detect_config
from nst_det.detection.torchvision import build_detector
from nst_det.engine.run_dir import RunFolder

TREE = """
ENGINE: torchvision
OUTPUT_DIR: {folder}
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: GeneralizedRCNN
  BACKBONE: {{NAME: build_timm_fpn_backbone, FREEZE_AT: 0}}
  TIMM: {{ARCH: nst_resnet10_w32, NORM: BN, OUT_FEATURES: [res4, res5]}}
  FPN: {{IN_FEATURES: [res4, res5], OUT_CHANNELS: 16}}
  ANCHOR_GENERATOR: {{SIZES: [[32], [64]]}}
  RPN: {{IN_FEATURES: [p4, p5], PRE_NMS_TOPK_TEST: 100, POST_NMS_TOPK_TEST: 50}}
  ROI_HEADS: {{NAME: StandardROIHeads, IN_FEATURES: [p4, p5], NUM_CLASSES: {classes}, SCORE_THRESH_TEST: 0.15}}
  ROI_BOX_HEAD: {{NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 5}}
DATASETS:
  VOC: {{own_train: {{ROOT: "{voc}", SPLIT: trainval}}, own_test: {{ROOT: "{voc}", SPLIT: test}}}}
  TRAIN: [own_train]
  TEST: [own_test]
INPUT: {{FORMAT: BGR, MIN_SIZE_TRAIN: [128], MAX_SIZE_TRAIN: 160, MIN_SIZE_TEST: 128, MAX_SIZE_TEST: 160}}
SOLVER: {{MAX_ITER: 7, IMS_PER_BATCH: 2}}
TEST: {{DETECTIONS_PER_IMAGE: 30}}
"""


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run folder as train-det leaves it, of a detector that was never trained but says much."""
    folder = tmp_path_factory.mktemp("export")
    settings = GenerateSettings(
        classification_images=10, classification_val_images=10, detection_images=6, detection_test_images=4
    )
    voc = generate_data(folder / "data", settings, workers=1) / DETECTION
    classes = VocDataset(voc, "trainval").classes
    file = folder / "detect.yaml"
    file.write_text(TREE.format(folder=folder / "run", voc=voc, classes=len(classes)))
    config = load_detect_config(file)
    detector = build_detector(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if parameter.ndim > 1 and any(part in name for part in ("rpn_head", "box_predictor")):
                # large deltas would amplify what two ways of adding the same numbers differ by
                scale = 0.01 if "deltas" in name or "bbox" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    run = RunFolder(folder / "run")
    with run.opened(config):
        save_weights(run.path / "model.safetensors", detector, classes)
        run.finish({"map": 0.25, "map_area": 0.2, "per_class": dict.fromkeys(classes, 0.25), "steps": 7, "seed": 3})
    return run.path
