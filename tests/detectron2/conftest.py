from pathlib import Path

import pytest
import torch

from nst_det.backbones import Card, create_model, input_contract, save_backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
