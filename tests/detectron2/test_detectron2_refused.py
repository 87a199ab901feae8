"""What can't be followed ends the command with one line that names the key or the file."""

import re
import shutil

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.modeling import build_model

from nst_det.detection.checkpoint import save_weights
from nst_det.detectron2 import DistillTrainer
from nst_det.detectron2.checkpoint import BackboneCheckpointer
from nst_det.detectron2.config import load_config
from nst_det.detectron2.data import build_train_loader
from nst_det.engine.distributed import TIMEOUT
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError

TEACHER = ["METHOD", "nst-poly", "TEACHER.CONFIG_FILE"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["MODEL.WIGHTS", "x"], "unknown key MODEL.WIGHTS; did you mean MODEL.WEIGHTS"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth: .* MODEL.WEIGHTS"),
        (["MODEL.WEIGHTS", "backbone://nobody"], "backbone://nobody"),
        (["MODEL.WEIGHTS", __file__], "test_detectron2_refused.py"),
        (["SOLVER.OPTIMIZER", "LION"], "SOLVER.OPTIMIZER"),
        (["SOLVER.ACCUMULATE", "2"], "SOLVER.ACCUMULATE"),
        (["SOLVER.COMPILE", "default"], "SOLVER.COMPILE"),
        (["INPUT.PADDED_SIZES", "[[96, 96]]"], "INPUT.PADDED_SIZES"),
        (["INPUT.FORMAT", "L", "INPUT.PHOTOMETRIC", "0.5"], "INPUT.PHOTOMETRIC"),
        (["SOLVER.EMA_DECAY", "1.5"], "SOLVER.EMA_DECAY"),
        (["SOLVER.EMA_DECAY", "0.9", "TEST.PRECISE_BN.ENABLED", "True"], "SOLVER.EMA_DECAY .* TEST.PRECISE_BN"),
        (["DATASETS.TRAIN", "['voc_x']"], "add DATASETS.VOC.voc_x"),
        (["DATASETS.VAL_FRACTION", "0.25", "DATASETS.TRAIN", "[tiny_test]"], "DATASETS.VAL_FRACTION: tiny_test"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "MODEL.ROI_HEADS.NUM_CLASSES"),
        (["MODEL.TIMM.NORM", "LN"], "MODEL.TIMM.NORM"),
        (["MODEL.TIMM.ARCH", "resnet1"], "MODEL.TIMM: .*resnet1"),
        (["MODEL.TIMM.OUT_FEATURES", "['res3', 'res4']"], "MODEL.FPN.IN_FEATURES"),
        (["MODEL.FPN.IN_FEATURES", "[]"], "MODEL.FPN.IN_FEATURES"),
        (["MODEL.FPN.IN_FEATURES", "['res2', 'res4']"], "MODEL.FPN.IN_FEATURES"),
        (["DATASETS.TRAIN", "[]"], "DATASETS.TRAIN"),
        (["--num-machines", "2"], "--num-machines: .*--dist-url"),
        # layers that would be frozen and random
        (["MODEL.TIMM.NORM", "FrozenBN"], "random weights"),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "random weights"),
        (["METHOD", "nst-poly"], "needs a teacher"),
        ([*TEACHER, "nowhere.yaml"], "nowhere.yaml"),
        ([*TEACHER, "{teacher}"], "TEACHER.WEIGHTS"),
        ([*TEACHER, "{teacher}", "TEACHER.WEIGHTS", "{weights}", "TRANSFER.LEVELS", "['p9']"], "p9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values(train, tiny_teacher, tmp_path, capsys, words, named):
    words = [word.format(teacher=tiny_teacher[0], weights=tiny_teacher[1]) for word in words]
    flags = words if words[0].startswith("--") else []
    assert train(tmp_path / "run", *words[len(flags) :], flags=flags, test=True) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert re.search(named, found), found


@pytest.mark.parametrize("seed", [3, -1])
def test_images_without_an_object_to_train_on(configured, voc_root, tmp_path, seed):
    root = shutil.copytree(voc_root, tmp_path / "hard")
    for file in (root / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))
    cfg = configured("DATASETS.VOC", {"hard": {"ROOT": str(root), "SPLIT": "train"}}, "DATASETS.TRAIN", "[hard]",
                     "DATASETS.TEST", "[]", "SEED", seed)  # fmt: skip
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN: .*hard"):
        build_train_loader(cfg)


@pytest.mark.parametrize("key", ["DATASETS.TEST", "DATASETS.VAL"])
def test_a_class_that_is_not_trained_is_refused_before_training(train, voc_root, tmp_path, capsys, key):
    root, folder = shutil.copytree(voc_root, tmp_path / "voc"), tmp_path / "run"
    file = root / "Annotations" / "i09.xml"
    file.write_text(file.read_text().replace("<name>square", "<name>ring"))
    entry = {"other": {"ROOT": str(root), "SPLIT": "test"}}
    assert train(folder, "DATASETS.VOC", entry, key, "[other]", test=key == "DATASETS.TEST") == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"{key} other: {file}: .*ring.*DATASETS\.CLASSES", found), found
    assert not (folder / "metrics.jsonl").exists()


def test_an_image_that_is_none_has_no_parity(cli, tiny_teacher, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    named = ["--config-file", tiny_teacher[0], "--weights", tiny_teacher[1]]
    assert cli("parity", *named, "--image", tmp_path / "notes.txt") == 2
    assert "notes.txt" in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_of_other_classes(configured, taught, tiny_teacher, tmp_path):
    config = tmp_path / "teacher.yaml"
    config.write_text(f"_BASE_: {tiny_teacher[0]}\nDATASETS: {{CLASSES: [square, bar]}}\n")
    with pytest.raises(UserError, match="bar, square.* square, bar"):
        DistillTrainer(configured(*taught("kd", teacher=(str(config), tiny_teacher[1]))))


@pytest.mark.parametrize(
    "classes", [["bar", "square"], ["bar", "ring"], ["bar", "ring", "square"], ["ring"], ["square", "bar"]]
)
def test_weights_of_other_classes(configured, tmp_path, classes, caplog):
    """They fill all but the predictor where a detector is trained, and are refused where one is evaluated."""
    cfg = configured()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    saved = build_model(cfg)
    path = tmp_path / "other.safetensors"
    save_weights(path, saved, classes)
    cfg = configured("MODEL.WEIGHTS", path)
    known = ["bar", "square"]
    if sorted(classes) == known != classes:
        # another order is no other class
        with pytest.raises(UserError, match=r"other.safetensors .*DATASETS.CLASSES to \[square, bar\]"):
            DistillTrainer(cfg).resume_or_load(resume=False)
        return
    caplog.set_level("INFO")
    trainer = DistillTrainer(cfg)
    fresh = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    trainer.resume_or_load(resume=False)
    same = classes == known
    for name, value in trainer.student.state_dict().items():
        expected = fresh if "box_predictor" in name and not same else saved.state_dict()
        assert torch.equal(value, expected[name]), name
    assert ("the whole detector" if same else f"trained on the classes {', '.join(classes)}") in caplog.text
    if not same:
        with pytest.raises(UserError, match=f"other.safetensors .*{classes[-1]}.* bar, square"):
            BackboneCheckpointer(build_model(cfg), whole=True, classes=known).load(str(path))


def test_an_error_in_a_process(train, tmp_path, monkeypatch, capsys):
    trace = "Traceback ...\n  File ...\nnst_det.errors.UserError: SOLVER.OPTIMIZER: wrong\n"

    def fail(*_, timeout, **__):
        # an evaluation by the first process may take hours
        assert timeout == TIMEOUT
        raise ProcessRaisedException(trace, 0, 1)

    monkeypatch.setattr("nst_det.detectron2.train_net.launch", fail)
    assert train(tmp_path / "run", flags=["--num-gpus", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "nst-det: SOLVER.OPTIMIZER: wrong"
    assert train(tmp_path / "run", "SOLVER.IMS_PER_BATCH", "3", flags=["--num-gpus", "2"]) == 2
    assert "SOLVER.IMS_PER_BATCH 3" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "named"), [("cuda:1", "MODEL.DEVICE cuda:1"), ("cpu", "--num-gpus")])
def test_processes_that_cannot_meet_on_these_gpus(train, tmp_path, monkeypatch, capsys, device, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("nst_det.detectron2.train_net.launch", lambda *_, **__: None)
    assert train(tmp_path / "run", "MODEL.DEVICE", device, flags=["--num-gpus", "2"]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("key", ["MODEL.TIMM.NORM", "MODEL.FPN.NORM"])
def test_normalization_over_processes_on_the_cpu(train, tmp_path, capsys, key):
    assert train(tmp_path / "run", key, "SyncBN", flags=["--num-gpus", "2"]) == 2
    assert f"{key} SyncBN" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_another_runs_folder(train, tiny_yaml, tmp_path, capsys):
    folder = tmp_path / "run"
    with RunFolder(folder).opened(load_config(tiny_yaml, ["OUTPUT_DIR", str(folder), "SEED", "9"])):
        (folder / "model_0000004.pth").touch()
    assert train(folder, test=True) == 2
    assert "SEED 9" in capsys.readouterr().err
