import sys
from pathlib import Path

import pytest

from nst_det.detection import config as module
from nst_det.detection.config import (
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
from nst_det.detection.d2_defaults import DETECTRON2_ONLY, TAKEN_VALUES
from nst_det.engine.config import flat
from nst_det.engine.device import loader_workers
from nst_det.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detect"


def write(path, text):
    path.write_text(text)
    return path


def test_the_values_that_are_taken_are_those_of_known_keys():
    known = flat(get_defaults())
    assert set(TAKEN_VALUES) <= set(known)
    assert not any(key == name or key.startswith(f"{name}.") for key in known for name in DETECTRON2_ONLY)


def test_base_config_loads(base_file):
    config = load_detect_config(base_file)
    assert config.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert config.MODEL.RPN.BATCH_SIZE_PER_IMAGE == 256


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.MASK_ON", "True"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
        ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"),
        ("MODEL.FPN.NORM", "GN"),
        ("INPUT.CROP.ENABLED", "True"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"),
        ("SOLVER.OPTIMIZER", "LARS"),
    ],
)
def test_a_value_that_cant_be_honored_is_an_error_that_names_it(base_file, key, value):
    with pytest.raises(UserError, match=f"can't honor {key} {value}|can't honor {key} '{value}'"):
        load_detect_config(base_file, [key, value])


def test_a_key_of_detectron2_alone_is_an_error_that_says_so(base_file, tmp_path):
    file = write(tmp_path / "a.yaml", f"_BASE_: {base_file}\nMODEL:\n  RESNETS:\n    DEPTH: 50\n")
    with pytest.raises(UserError, match=r"a\.yaml: the torchvision engine can't honor MODEL\.RESNETS.*detectron2"):
        load_detect_config(file)
    with pytest.raises(UserError, match=r"command line: the torchvision engine can't honor TEST\.AUG\.FLIP"):
        load_detect_config(base_file, ["TEST.AUG.FLIP", "False"])


def test_an_unknown_key_is_an_error_with_the_nearest_one(base_file):
    with pytest.raises(UserError, match=r"unknown key SOLVER\.BASE_LEARNING; did you mean SOLVER\.BASE_LR"):
        load_detect_config(base_file, ["SOLVER.BASE_LEARNING", "1"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["MODEL.FPN.IN_FEATURES", "[]"], "MODEL.FPN.IN_FEATURES is empty"),
        (["MODEL.FPN.IN_FEATURES", "['res7']"], "no level 'res7'"),
        (["MODEL.RPN.IN_FEATURES", "['res4']"], "MODEL.RPN.IN_FEATURES: no level 'res4'; there are p2, p3, p4, p5, p6"),
        (["MODEL.ROI_HEADS.IN_FEATURES", "['p9']"], "no level 'p9'"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"], "has 2 lists for 5 levels"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[8, 16]"], "must be a list of lists"),
        (["MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"], "PIXEL_STD above 0"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "two of them to sample a range"),
    ],
)
def test_values_that_contradict_each_other_are_errors(base_file, words, line):
    with pytest.raises(UserError, match=line.replace("[", r"\[")):
        load_detect_config(base_file, words)


def test_engine(monkeypatch, caplog):
    monkeypatch.setattr(module, "engine_is_installed", lambda: False)
    with caplog.at_level("INFO"):
        assert choose_engine("auto") == "torchvision"
    assert "Detectron2 is not installed, taking torchvision" in caplog.text
    with pytest.raises(
        UserError, match=r"not installed; see https://detectron2\.readthedocs\.io/en/latest/tutorials/inst"
    ):
        choose_engine("detectron2")
    monkeypatch.setattr(module, "engine_is_installed", lambda: True)
    assert choose_engine("auto") == choose_engine("detectron2") == "detectron2"
    assert choose_engine("torchvision") == "torchvision"
    with pytest.raises(UserError, match="'mmdet' is not one of auto, detectron2, torchvision"):
        choose_engine("mmdet")


def test_looking_for_the_engine_imports_nothing():
    before = set(sys.modules)
    module.engine_is_installed()
    assert "detectron2" not in set(sys.modules) - before


def test_wanted_engine(tmp_path):
    file = write(tmp_path / "a.yaml", "ENGINE: torchvision\n")
    assert wanted_engine(file, []) == "torchvision"
    assert wanted_engine(file, ["SEED", "1", "ENGINE", "detectron2"]) == "detectron2"
    assert wanted_engine(None, []) == "auto"


def test_resolve_classes(base_file):
    config = load_detect_config(base_file)
    resolve_classes(config, ["a", "b"])
    assert config.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert config.is_frozen()
    resolve_classes(config, ["a", "b"])
    with pytest.raises(UserError, match="NUM_CLASSES is 2, but the data has 3 classes"):
        resolve_classes(config, ["a", "b", "c"])


def test_voc_roots(monkeypatch, tmp_path):
    monkeypatch.delenv("NST_DET_NOWHERE", raising=False)
    config = load_detect_config(
        None, ["DATASETS.VOC", "{'a': {'ROOT': '$NST_DET_NOWHERE/x', 'SPLIT': 'train'}, 'b': {'ROOT': 'y'}}",
               "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
               "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
    )  # fmt: skip
    with pytest.raises(UserError, match="NST_DET_NOWHERE is not set"):
        voc_roots(config, ["a"], "DATASETS.TRAIN")
    monkeypatch.setenv("NST_DET_NOWHERE", str(tmp_path))
    assert voc_roots(config, ["a"], "DATASETS.TRAIN") == [(tmp_path / "x", "train")]
    with pytest.raises(UserError, match=r"DATASETS\.VOC\.b\.SPLIT is missing"):
        voc_roots(config, ["b"], "DATASETS.TRAIN")
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN: no data set 'c' in DATASETS\.VOC, which has a, b"):
        voc_roots(config, ["c"], "DATASETS.TRAIN")


def test_the_cpu_stands_in_for_a_missing_gpu(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("cuda:0") == "cpu"
    assert "no GPU here, taking the CPU" in caplog.text
    assert resolve_device("cpu") == "cpu"


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


def test_loader_processes_share_the_cores_of_their_machine(monkeypatch):
    monkeypatch.setattr("nst_det.engine.device.core_count", lambda: 12)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    # one thread each is what torchrun gives its processes, not what they may use
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loader_workers(-1, on_cpu=False) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert loader_workers(-1, on_cpu=False) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert loader_workers(-1, on_cpu=False) == 1
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    assert loader_workers(-1, on_cpu=False) == 8


@pytest.mark.detectron2
def test_names_and_defaults_are_detectron2s(base_file):
    d2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    theirs, ours = d2.get_cfg(), get_defaults()
    known = flat(theirs)
    add_nst_det_config(theirs)
    added = set(flat(theirs)) - set(known)
    for key, value in flat(ours).items():
        if key not in added:
            assert known[key] == value, key
            assert type(known[key]) is type(value), key
    unlisted = [
        key
        for key in known
        if key not in flat(ours) and not any((key + ".").startswith(f"{n}.") for n in DETECTRON2_ONLY)
    ]
    assert unlisted == []


@pytest.mark.detectron2
def test_detectron2_loads_the_same_file(base_file, monkeypatch):
    d2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    theirs = d2.get_cfg()
    add_nst_det_config(theirs)
    theirs.merge_from_file(str(base_file.parent / "shapes.yaml"))
    ours = flat(load_detect_config(base_file.parent / "shapes.yaml"))
    same = flat(theirs)
    for key, value in ours.items():
        assert list(same[key]) == list(value) if isinstance(value, list | tuple) else same[key] == value, key


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_that_is_shipped_loads(file):
    config = load_detect_config(file)
    assert config.MODEL.ROI_HEADS.NUM_CLASSES >= 0
    for node in config.DATASETS.VOC.values():
        # no path of one machine
        assert node.ROOT.startswith("$")
