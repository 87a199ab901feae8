import re
import sys
from pathlib import Path

import pytest

from nst_det.detection import config as module
from nst_det.detection.config import (
    ADDED,
    add_nst_det_config,
    choose_engine,
    get_defaults,
    load_detect_config,
    resolve_classes,
    resolve_device,
    resolve_machine,
    voc_roots,
    wanted_engine,
)
from nst_det.detection.d2_defaults import DETECTRON2_ONLY
from nst_det.detection.pipeline import train_detector
from nst_det.engine.config import flat
from nst_det.engine.device import loader_workers
from nst_det.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detect"


def only_detectron2s(key):
    return any(f"{key}.".startswith(f"{name}.") for name in DETECTRON2_ONLY)


def test_base_config_loads(base_file):
    config = load_detect_config(base_file)
    assert config.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert config.MODEL.RPN.BATCH_SIZE_PER_IMAGE == 256
    assert not any(map(only_detectron2s, flat(config)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # Detectron2 has them and this engine doesn't
        ("TEST.AUG.FLIP", "False"),
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.MASK_ON", "True"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"),
        ("MODEL.FPN.NORM", "GN"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"),
        # out of range
        ("SOLVER.OPTIMIZER", "LARS"),
        ("SOLVER.AMP.DTYPE", "fp16"),
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.ACCUMULATE", "0"),
        ("SOLVER.EMA_DECAY", "1"),
        ("SOLVER.NON_FINITE.POLICY", "pray"),
        ("DATASETS.VAL_FRACTION", "1.0"),
        ("INPUT.AUGMENTATION", "ssd"),
        ("INPUT.SCALE_JITTER", "[2.0, 0.5]"),
        ("INPUT.SCALE_JITTER", "[0.5, .inf]"),
        ("INPUT.PHOTOMETRIC", "1.5"),
        ("TEST.AMP", "True"),
        ("TEST.SELECT", "first"),
        ("TEST.SELECT", "best"),
        ("TRANSFER.WARMUP_ITERS", "-1"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"),
        ("SOLVER.BASE_LEARNING", "1"),
        # levels that aren't there, or lists that don't fit them
        ("MODEL.FPN.IN_FEATURES", "[]"),
        ("MODEL.FPN.IN_FEATURES", "['res7']"),
        ("MODEL.RPN.IN_FEATURES", "['res4']"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p9']"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[8, 16]"),
        ("MODEL.TIMM.OUT_FEATURES", "['c2', 'c3']"),
        ("DATASETS.VOC", "{cells: /data/cells}"),
        ("DATASETS.VOC", "{cells: {ROOT: cells, SPLIT: train, YEAR: 2007}}"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.5]"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.3, 0.5]"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_key(base_file, key, value):
    with pytest.raises(UserError, match=re.escape(key)) as error:
        load_detect_config(base_file, [key, value])
    assert "\n" not in str(error.value)


def test_other_bad_input(base_file, tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text(f"_BASE_: {base_file}\nMODEL:\n  RESNETS:\n    DEPTH: 50\n")
    with pytest.raises(UserError, match=r"a\.yaml.*MODEL\.RESNETS"):
        load_detect_config(file)
    for sizes in ("[800]", "[800, 640]"):
        with pytest.raises(UserError, match=r"INPUT\.MIN_SIZE_TRAIN"):
            load_detect_config(base_file, ["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN", sizes])
    with pytest.raises(UserError, match=r"MODEL\.DEVICE: .*'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr("nst_det.engine.metrics.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="WANDB"):
        load_detect_config(base_file, ["WANDB", "shapes"])


def test_engine(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(module, "engine_is_installed", lambda: False)
    with caplog.at_level("INFO"):
        assert choose_engine("auto") == "torchvision"
    assert "taking torchvision" in caplog.text
    with pytest.raises(UserError, match=r"ENGINE detectron2.*https://detectron2\.readthedocs\.io"):
        choose_engine("detectron2")
    monkeypatch.setattr(module, "engine_is_installed", lambda: True)
    assert choose_engine("auto") == choose_engine("detectron2") == "detectron2"
    assert choose_engine("torchvision") == "torchvision"
    with pytest.raises(UserError, match="mmdet"):
        choose_engine("mmdet")
    file = tmp_path / "a.yaml"
    file.write_text("ENGINE: torchvision\n")
    assert wanted_engine(file, []) == "torchvision"
    assert wanted_engine(file, ["SEED", "1", "ENGINE", "detectron2"]) == "detectron2"
    assert wanted_engine(None, []) == "auto"


def test_looking_for_detectron2_imports_nothing_and_takes_no_folder_for_it(tmp_path, monkeypatch):
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "detectron2").mkdir()
    assert not module.engine_is_installed()
    (tmp_path / "detectron2" / "__init__.py").touch()
    assert module.engine_is_installed()
    assert "detectron2" not in set(sys.modules) - before


def test_resolve_classes(base_file):
    config = load_detect_config(base_file)
    for _ in range(2):
        resolve_classes(config, ["a", "b"])
        assert config.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert config.is_frozen()
    with pytest.raises(UserError, match="NUM_CLASSES is 2, but the data has 3 classes"):
        resolve_classes(config, ["a", "b", "c"])


def test_voc_roots(monkeypatch, tmp_path, base_file):
    monkeypatch.delenv("NST_DET_NOWHERE", raising=False)
    folders = {"a": {"ROOT": "$NST_DET_NOWHERE/x", "SPLIT": "train"}, "b": {"ROOT": "y"}}
    config = load_detect_config(base_file, ["DATASETS.VOC", str(folders)])
    for name, wanted in (("a", "NST_DET_NOWHERE"), ("b", "DATASETS.VOC.b.SPLIT"), ("c", "DATASETS.TRAIN: .*'c'")):
        with pytest.raises(UserError, match=wanted):
            voc_roots(config, [name], "DATASETS.TRAIN")
    monkeypatch.setenv("NST_DET_NOWHERE", str(tmp_path))
    assert voc_roots(config, ["a"], "DATASETS.TRAIN") == [(tmp_path / "x", "train")]


@pytest.mark.parametrize(
    ("gpu", "asked", "found"),
    [
        (False, ("auto", -1), ("cpu", 0)),
        (False, ("auto", 3), ("cpu", 3)),
        (True, ("auto", -1), ("cuda", 6)),
        (True, ("auto", 0), ("cuda", 0)),
        (True, ("cpu", -1), ("cpu", 0)),
        (True, ("cuda:1", -1), ("cuda:1", 6)),
    ],
)
def test_auto_and_minus_one_are_what_fits_the_machine(base_file, monkeypatch, gpu, asked, found, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    monkeypatch.setattr("nst_det.engine.device.core_count", lambda: 32)
    config = load_detect_config(base_file, ["MODEL.DEVICE", asked[0], "DATALOADER.NUM_WORKERS", str(asked[1])])
    # a comparison hands the words on to whatever machine a run is on
    assert asked == (config.MODEL.DEVICE, config.DATALOADER.NUM_WORKERS)
    resolve_machine(config)
    assert found == (config.MODEL.DEVICE, config.DATALOADER.NUM_WORKERS)
    assert config.is_frozen()
    assert "no GPU here" not in caplog.text
    if not gpu:
        assert resolve_device("cuda:0") == "cpu"
        assert "no GPU here, taking the CPU" in caplog.text


def test_processes_take_a_gpu_each(base_file, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_detect_config(base_file, ["MODEL.DEVICE", "cuda:1"])
    with pytest.raises(UserError, match=r"MODEL\.DEVICE cuda:1: .*CUDA_VISIBLE_DEVICES"):
        train_detector(config)


def test_loader_processes_share_the_cores_of_their_machine(monkeypatch):
    monkeypatch.setattr("nst_det.engine.device.core_count", lambda: 12)
    # one thread each is what torchrun gives its processes, not what they may use
    for processes, threads, workers in (("4", 1, 3), ("16", 1, 1), ("1", 1, 1), ("1", 64, 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert loader_workers(-1) == workers


@pytest.mark.detectron2
def test_names_and_defaults_are_detectron2s():
    d2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    theirs, ours = flat(d2.get_cfg()), flat(get_defaults())
    for key in [key for key in ours if key in theirs]:
        assert theirs[key] == ours[key], key
        assert type(theirs[key]) is type(ours[key]), key
    names = [key for key in ours if key not in theirs]
    assert all(any(key == name or key.startswith(f"{name}.") for name in ADDED) for key in names)
    assert [key for key in theirs if key not in ours and not only_detectron2s(key)] == []
    both = d2.get_cfg()
    add_nst_det_config(both)
    assert {key: flat(both)[key] for key in names} == {key: ours[key] for key in names}


@pytest.mark.detectron2
def test_detectron2_loads_the_same_file(base_file):
    d2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    theirs = d2.get_cfg()
    add_nst_det_config(theirs)
    theirs.merge_from_file(str(base_file.parent / "shapes.yaml"))
    same = flat(theirs)
    for key, value in flat(load_detect_config(base_file.parent / "shapes.yaml")).items():
        assert list(same[key]) == list(value) if isinstance(value, list | tuple) else same[key] == value, key


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_that_is_shipped_loads(file):
    config = load_detect_config(file)
    # no path of one machine
    assert all(node.ROOT.startswith("$") for node in config.DATASETS.VOC.values())
