"""Detectron2's own ResNet as the target, and backbone files in its checkpointer."""

import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch

detectron2 = pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from nst_det.cli import main  # noqa: E402
from nst_det.detectron2.checkpoint import BackboneCheckpointer  # noqa: E402
from nst_det.detectron2.export import export_backbone  # noqa: E402
from nst_det.errors import UserError  # noqa: E402
from nst_det.models import bottomup_from_file  # noqa: E402

PLAIN = """
import sys, json, torch
sys.modules["nst_det"] = None  # an import of it would fail
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.WEIGHTS = sys.argv[2]
model = build_model(cfg).eval()
checkpointer = DetectionCheckpointer(model)
missing = []
checkpointer._log_incompatible_keys = lambda found: missing.extend(found.missing_keys)
checkpointer.load(cfg.MODEL.WEIGHTS)
images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    maps = model.backbone.bottom_up(images)
torch.save({"missing": missing, "maps": maps, "format": model.input_format}, sys.argv[3])
"""


def run_plain(code, *arguments):
    """Run code in a process from which the checkout is out of reach."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "NST_DET_BACKBONES")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd="/",
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "suffix"), [("r18", ".pkl"), ("r50", ".pkl"), ("r18", ".pth")])
def test_a_plain_detectron2_computes_the_same_maps(name, suffix, tmp_path):
    exported = export_backbone(f"backbone://{name}", tmp_path / f"out{suffix}")
    assert exported.parity is not None
    assert exported.parity <= 1e-4

    run_plain(PLAIN, exported.config, exported.weights, tmp_path / "seen.pt")
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["format"] == "RGB"
    assert [key for key in seen["missing"] if key.startswith("backbone.bottom_up")] == []
    assert any(key.startswith("backbone.fpn_") for key in seen["missing"])
    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = bottomup_from_file(f"backbone://{name}").eval()(images)
    for level, map_ in wanted.items():
        torch.testing.assert_close(seen["maps"][level], map_, atol=1e-4, rtol=0)


def test_the_command_prints_files_and_parity(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["export", "--format", "detectron2", "--weights", "backbone://r18", "--output", str(tmp_path / "x.pkl")])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "x.yaml" in printed
    assert "compared  " in printed
    with open(tmp_path / "x.pkl", "rb") as file:
        content = pickle.load(file)
    assert not any("fc" in key.split(".") for key in content["model"])


def test_what_detectron2_cannot_build_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match="build_timm_fpn_backbone"):
        export_backbone("backbone://small", tmp_path / "x.pkl")
    assert list(tmp_path.iterdir()) == []


def resnet_cfg(tmp_path, **resnets):
    config = export_backbone("backbone://r18", tmp_path / "e.pkl").config
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def test_backbone_paths_fill_detectron2s_resnet(tmp_path, caplog):
    cfg = resnet_cfg(tmp_path)
    exact, plain = build_model(cfg), build_model(cfg)
    with caplog.at_level(logging.INFO):
        BackboneCheckpointer(exact).load("backbone://r18")
    assert "FPN (" in caplog.text
    assert "RoI heads (" in caplog.text
    # Detectron2's own class, which knows the scheme from its path manager
    DetectionCheckpointer(plain).load("backbone://r18")
    for (name, one), other in zip(
        exact.backbone.bottom_up.state_dict().items(), plain.backbone.bottom_up.state_dict().values()
    ):
        assert torch.equal(one, other), name
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = bottomup_from_file("backbone://r18").eval()(images)
        got = exact.eval().backbone.bottom_up(images)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_another_depth_and_other_pixels_are_refused(tmp_path):
    with pytest.raises(UserError, match="don't fit"):
        BackboneCheckpointer(build_model(resnet_cfg(tmp_path))).load("backbone://r50")
    cfg = resnet_cfg(tmp_path)
    cfg.INPUT.FORMAT = "BGR"
    with pytest.raises(UserError, match="INPUT.FORMAT RGB"):
        BackboneCheckpointer(build_model(cfg)).load("backbone://r18")
    cfg = resnet_cfg(tmp_path)
    cfg.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    with pytest.raises(UserError, match="PIXEL_STD"):
        BackboneCheckpointer(build_model(cfg)).load("backbone://r18")


def test_stride_in_1x1_is_refused(tmp_path):
    config = export_backbone("backbone://r50", tmp_path / "e.pkl").config
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = "cpu", "", True
    with pytest.raises(UserError, match="STRIDE_IN_1X1 False"):
        BackboneCheckpointer(build_model(cfg)).load("backbone://r50")
