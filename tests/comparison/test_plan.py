from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from nst_det.comparison.collect import _differs
from nst_det.comparison.config import load_comparison
from nst_det.comparison.pipeline import check_folders
from nst_det.comparison.plan import make_plan, run_config
from nst_det.detection.torchvision import build_detector
from nst_det.engine.config import flat
from nst_det.engine.io import sha256_of_file, write_text
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.models import Card, create_model, input_contract, save_backbone
from tests.helpers.hub import NAME, offline_cache, snapshot, weights


def test_the_runs_and_what_they_need(comparison):
    needs = {run.name: run.needs for run in make_plan(comparison)}
    assert needs == {
        "teacher": (),
        "distill/seed0": ("teacher",),
        "distill/seed1": ("teacher",),
        "detect/seed0/scratch": (),
        "detect/seed0/ce": ("distill/seed0",),
        "detect/seed0/kd": ("distill/seed0",),
        "detect/seed0/kd+nst-poly": ("distill/seed0",),
        "detect/seed1/scratch": (),
        "detect/seed1/ce": ("distill/seed1",),
        "detect/seed1/kd": ("distill/seed1",),
        "detect/seed1/kd+nst-poly": ("distill/seed1",),
    }


def test_settings_of_each_kind(comparison):
    runs = {run.name: run for run in make_plan(comparison)}
    folder = comparison.folder
    assert runs["teacher"].settings["METHODS"] == []
    assert runs["distill/seed1"].settings == {
        "NAME": "small",
        "REGISTRY": str(folder / "backbones"),
        "OUTPUT_DIR": str(folder / "distill" / "seed1"),
        "SEED": 1,
        "METHODS": ["ce", "kd", "kd+nst-poly"],
        "TEACHER.WEIGHTS": str(folder / "backbones" / "small-teacher.safetensors"),
    }
    detector, scratch = runs["detect/seed1/kd+nst-poly"], runs["detect/seed0/scratch"]
    assert detector.settings == {
        "OUTPUT_DIR": str(folder / "detect" / "seed1" / "kd+nst-poly"),
        "SEED": 1,
        "ENGINE": "torchvision",
        "MODEL.WEIGHTS": str(folder / "backbones" / "small-kd+nst-poly-s1.safetensors"),
    }
    assert (detector.row, detector.seed, detector.options) == ("kd+nst-poly", 1, ())
    assert scratch.settings["MODEL.WEIGHTS"] == ""
    assert scratch.options == ("SOLVER.BACKBONE_MULTIPLIER", "0.5")
    assert {run.threads for run in runs.values() if run.detects} == {1}
    assert {run.threads for run in runs.values() if not run.detects} == {2}


def test_published_weights_are_a_row(config_file, tmp_path):
    with pytest.raises(UserError, match=r"ROWS: imagenet .*DETECT\.IMAGENET_OPTS.*DISTILL\.STUDENT\.WEIGHTS"):
        load_comparison(config_file, overrides=["ROWS", "[imagenet]"])
    named = str(tmp_path / "named.pth")
    for words, options in {
        ("DISTILL.STUDENT.WEIGHTS", named): ("MODEL.WEIGHTS", named),
        ("DISTILL.STUDENT.PRETRAINED", "True"): ("MODEL.TIMM.PRETRAINED", "True"),
        ("DETECT.IMAGENET_OPTS", f"[MODEL.WEIGHTS, {named}]"): ("MODEL.WEIGHTS", named),
    }.items():
        comparison = load_comparison(config_file, overrides=["ROWS", "[imagenet]", *words])
        assert comparison.all_rows[:3] == ("scratch", "imagenet", "ce")
        run = {run.name: run for run in make_plan(comparison)}["detect/seed1/imagenet"]
        assert (run.needs, run.options) == ((), options)
        model = run_config(comparison, run).MODEL
        assert ((named, False) if named in options else ("", True)) == (model.WEIGHTS, model.TIMM.PRETRAINED)


def test_a_detector_from_elsewhere_is_a_row(config_file, comparison, tmp_path):
    with torch.device("meta"):
        theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None), num_classes=91).state_dict()
    # its shapes alone
    torch.save({name: torch.zeros(1).expand(value.shape) for name, value in theirs.items()}, tmp_path / "coco.pth")
    words = ["ROWS", "[coco]", "DETECT.COCO_OPTS"]
    given = f"[MODEL.WEIGHTS, {tmp_path}/coco.pth, MODEL.KEEP_CLASSES, True, MODEL.BACKBONE.FREEZE_AT, 3]"
    added = load_comparison(config_file, tmp_path / "out", [*words, given])
    assert added.all_rows == ("scratch", "coco", "ce", "kd", "kd+nst-poly")
    # the row can be added to a finished comparison
    assert added.claim == comparison.claim
    run = {run.name: run for run in make_plan(added)}["detect/seed1/coco"]
    assert run.needs == ()
    config, base = run_config(added, run), comparison.detect
    assert str(tmp_path / "coco.pth") == config.MODEL.WEIGHTS
    wanted = {"TIMM.ARCH": "resnet50", "FPN.OUT_CHANNELS": 256, "ROI_BOX_HEAD.FC_DIM": 1024}
    values = flat(config)
    assert {key: values[f"MODEL.{key}"] for key in wanted} == wanted
    # the same budget as the other rows
    assert [config.SOLVER, config.INPUT, config.DATASETS, config.TEST] == [
        base.SOLVER,
        base.INPUT,
        base.DATASETS,
        base.TEST,
    ]
    lines = _differs(added, make_plan(added), "coco")
    assert "resnet50" in lines[0]
    assert "coco.pth" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["MODEL.BACKBONE.FREEZE_AT", "MODEL.KEEP_CLASSES"]
    # a run that is begun keeps its start
    folder = RunFolder(run.folders[0])
    with folder.opened(config, {"MODEL.WEIGHTS_SHA256": sha256_of_file(tmp_path / "coco.pth")}):
        folder.finish({})
    check_folders(added, make_plan(added))
    write_text(run.config_path(added.folder), config.dump())
    check_folders(added, make_plan(added))
    fewer = given.replace(", MODEL.BACKBONE.FREEZE_AT, 3", "")
    without = load_comparison(config_file, tmp_path / "out", [*words, fewer])
    with pytest.raises(UserError, match=r"seed1/coco: .*FREEZE_AT 3, now it is 2"):
        check_folders(without, make_plan(without))
    others = load_comparison(config_file, tmp_path / "out", [*words, given.replace(", 3]", ", 2]")])
    with pytest.raises(UserError, match=r"seed1/coco: .*FREEZE_AT 3"):
        check_folders(others, make_plan(others))
    torch.save({name: torch.ones(1).expand(value.shape) for name, value in theirs.items()}, tmp_path / "coco.pth")
    with pytest.raises(UserError, match=r"seed1/coco: .*coco\.pth"):
        check_folders(added, make_plan(added))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("[]", "name their file"),
        ("[MODEL.WEIGHTS]", "KEY VALUE pairs"),
        ("[MODEL.WEIGHTS, gone.pth]", r"gone\.pth"),
        ("[MODEL.WEIGHTS, 'a://b']", "name their file"),
    ],
)
def test_a_row_of_a_detector_that_isnt_there(config_file, given, named):
    with pytest.raises(UserError, match=rf"compare\.yaml: DETECT\.COCO_OPTS: .*{named}"):
        load_comparison(config_file, overrides=["ROWS", "[coco]", "DETECT.COCO_OPTS", given])


def test_a_teacher_of_ones_own_is_not_trained(config_file):
    words = ["DISTILL.TEACHER.WEIGHTS", "backbone://big", "ROWS", "['teacher']", "DISTILL.TEACHER.ARCH", "resnet50"]
    runs = {run.name: run for run in make_plan(load_comparison(config_file, overrides=words))}
    assert "teacher" not in runs
    assert runs["distill/seed0"].settings["TEACHER.WEIGHTS"] == "backbone://big"
    row = runs["detect/seed1/teacher"]
    assert row.needs == ()
    assert (row.settings["MODEL.WEIGHTS"], row.settings["MODEL.TIMM.ARCH"]) == ("backbone://big", "resnet50")


def test_the_row_teacher_has_the_network_of_the_teacher_s_own_file(config_file, tmp_path):
    file = tmp_path / "big.safetensors"
    kwargs = {"channels": [8, 8, 16, 16]}
    pixels = input_contract([0.5] * 3, [0.5] * 3, "RGB", 32)
    save_backbone(file, create_model("resnet18d", 3, **kwargs), Card("resnet18d", 3, kwargs, input=pixels))
    words = ["DISTILL.TEACHER.WEIGHTS", str(file), "ROWS", "['teacher']", "DISTILL.TEACHER.ARCH", "resnet50"]
    comparison = load_comparison(config_file, tmp_path / "out", words)
    row = next(run for run in make_plan(comparison) if run.row == "teacher")
    config = run_config(comparison, row)
    assert (config.MODEL.TIMM.ARCH, config.MODEL.TIMM.KWARGS["channels"]) == ("resnet18d", kwargs["channels"])


def test_the_row_teacher_has_the_pixels_of_a_teacher_with_its_own(config_file, tmp_path):
    words = ["ROWS", "['teacher']", "DISTILL.TEACHER.MEAN", "[0.5, 0.4, 0.3]", "DISTILL.TEACHER.STD", "[0.2, 0.2, 0.2]"]

    def pixels(*more):
        comparison = load_comparison(config_file, tmp_path / "out", [*words, *more])
        model = {run.row: run_config(comparison, run).MODEL for run in make_plan(comparison) if run.detects}
        return [(model[row].PIXEL_MEAN, model[row].PIXEL_STD) for row in ("teacher", "ce")]

    others = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    assert pixels() == [([127.5, 102.0, 76.5], [51.0] * 3), others]
    given = ["DETECT.TEACHER_OPTS", "[MODEL.PIXEL_MEAN, [127.5, 102, 77]]"]
    assert pixels(*given)[0] == ([127.5, 102, 77], [51.0] * 3)


def test_a_row_that_begins_by_name_is_compared_with_the_file_that_was_taken(config_file, tmp_path, monkeypatch):
    file = snapshot(offline_cache(tmp_path, monkeypatch)) / "model.safetensors"
    weights(file)
    words = ["ROWS", "[imagenet]", "DETECT.IMAGENET_OPTS", f"[MODEL.WEIGHTS, {NAME}]"]
    comparison = load_comparison(config_file, tmp_path / "out", words)
    run = next(run for run in make_plan(comparison) if run.row == "imagenet")
    config = run_config(comparison, run)
    with RunFolder(run.folders[0]).opened(config, {"MODEL.WEIGHTS_SHA256": sha256_of_file(file)}) as folder:
        folder.finish({})
    check_folders(comparison, make_plan(comparison))
    weights(file, classes=10)
    with pytest.raises(UserError, match=rf"seed0/imagenet: .*{NAME}"):
        check_folders(comparison, make_plan(comparison))
    # a finished run doesn't need it any more
    file.unlink()
    check_folders(comparison, make_plan(comparison))


def test_weights_that_a_teacher_begins_from_are_trained_once_for_all_seeds(config_file, tmp_path):
    (tmp_path / "lite2.pth").write_bytes(b"")
    words = ["DISTILL.TEACHER.WEIGHTS", str(tmp_path / "lite2.pth")]
    runs = {run.name: run for run in make_plan(load_comparison(config_file, tmp_path / "out", words))}
    assert "TEACHER.WEIGHTS" not in runs["teacher"].settings
    made = str(tmp_path / "out" / "backbones" / "small-teacher.safetensors")
    for seed in (0, 1):
        assert (runs[f"distill/seed{seed}"].needs, runs[f"distill/seed{seed}"].settings["TEACHER.WEIGHTS"]) == (
            ("teacher",),
            made,
        )
    # those that are taken as they are, are no run
    frozen = load_comparison(config_file, tmp_path / "out", [*words, "DISTILL.TEACHER.TRAIN", "False"])
    runs = {run.name: run for run in make_plan(frozen)}
    assert "teacher" not in runs
    assert runs["distill/seed0"].settings["TEACHER.WEIGHTS"] == words[1]


def test_rows_with_terms_of_stage_two_share_one_teacher_detector(config_file):
    words = ["METHODS", "[kd, cwd@det:5, kd+pkd@det]"]
    comparison = load_comparison(config_file, overrides=words)
    runs = {run.name: run for run in make_plan(comparison)}
    assert comparison.students == ("ce", "kd")
    assert runs["distill/seed1"].settings["METHODS"] == ["ce", "kd"]
    teacher = runs["detect/seed0/teacher"]
    assert (teacher.kind, teacher.row, teacher.needs) == ("teacher detector", None, ("teacher",))
    assert teacher.settings["MODEL.TIMM.ARCH"] == comparison.distill.TEACHER.ARCH
    assert [name for name in runs if name.endswith("/teacher")] == ["detect/seed0/teacher"]
    for seed in (0, 1):
        run = runs[f"detect/seed{seed}/kd+pkd@det"]
        assert run.needs == (f"distill/seed{seed}", "detect/seed0/teacher")
        config = run_config(comparison, run)
        assert config.MODEL.WEIGHTS.endswith(f"small-kd-s{seed}.safetensors")
        assert (config.METHOD, config.TRANSFER.LEVELS) == ("pkd", ["p2", "p3", "p4", "p5"])
        assert str(teacher.config_path(comparison.folder)) == config.TEACHER.CONFIG_FILE
        assert Path(config.TEACHER.WEIGHTS).parent == teacher.folders[0]
    only = run_config(comparison, runs["detect/seed1/cwd@det:5"])
    assert only.METHOD == "cwd:5"
    assert only.MODEL.WEIGHTS.endswith("small-ce-s1.safetensors")
    assert run_config(comparison, runs["detect/seed1/kd"]).METHOD == "ce"


def test_the_row_teacher_is_the_teacher_detector_too(config_file):
    words = ["METHODS", "[cwd@det]", "ROWS", "[teacher]"]
    runs = make_plan(load_comparison(config_file, overrides=words))
    names = [run.name for run in runs]
    assert len(names) == len(set(names))
    teacher = next(run for run in runs if run.name == "detect/seed0/teacher")
    assert (teacher.kind, teacher.row, teacher.seed) == ("detector", "teacher", 0)
    assert "detect/seed1/teacher" in names


def test_a_teacher_detector_of_ones_own_is_not_trained(config_file):
    words = ["METHODS", "[cwd@det]", "DETECT.TEACHER.CONFIG_FILE", "mine.yaml"]
    words += ["DETECT.TEACHER.WEIGHTS", "mine.safetensors", "DETECT.TRANSFER.LEVELS", "[p3]"]
    comparison = load_comparison(config_file, overrides=words)
    runs = {run.name: run for run in make_plan(comparison)}
    assert not any(name.endswith("/teacher") for name in runs)
    config = run_config(comparison, runs["detect/seed0/cwd@det"])
    assert (config.TEACHER.CONFIG_FILE, config.TEACHER.WEIGHTS) == ("mine.yaml", "mine.safetensors")
    assert config.TRANSFER.LEVELS == ["p3"]


def test_a_run_is_done_when_all_results_are_there(comparison):
    run = next(run for run in make_plan(comparison) if run.name == "distill/seed0")
    assert [path.parent.name for path in run.results] == ["ce", "kd", "kd+nst-poly"]
    for path in run.results:
        assert not run.done
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    assert run.done


def test_generated_data_comes_first_and_both_stages_read_it(config_file, tmp_path):
    words = ["DATA.GENERATE", "{'classification_images': 40, 'contrast': 90.5}", "DATA.ROOT", str(tmp_path / "made")]
    # so that fewer threads make it fit on a smaller node
    words += ["THREADS", "3"]
    comparison = load_comparison(config_file, tmp_path / "out", words)
    runs = {run.name: run for run in make_plan(comparison)}
    assert runs["data"].command(comparison.folder) == [
        "generate-data", "--output", str(tmp_path / "made"), "--workers", "3",
        "--classification-images", "40", "--contrast", "90.5",
    ]  # fmt: skip
    assert runs["data"].results == (tmp_path / "made" / "settings.json",)
    assert runs["teacher"].needs == runs["detect/seed0/scratch"].needs == ("data",)
    assert runs["distill/seed0"].settings["DATA.ROOT"] == str(tmp_path / "made" / "shapes_cls")
    settings = runs["detect/seed0/scratch"].settings
    for name in ("own_train", "own_test"):
        assert settings[f"DATASETS.VOC.{name}.ROOT"] == str(tmp_path / "made" / "shapes_voc")


def test_a_row_without_fpn_starts_from_the_backbone_of_ce(comparison, config_file, tmp_path):
    words = ["ROWS", "[no-fpn]", "DETECT.NO_FPN_OPTS", "[SOLVER.BASE_LR, 0.125]"]
    bare = load_comparison(config_file, tmp_path / "out", words)
    assert bare.all_rows == ("scratch", "ce", "kd", "kd+nst-poly", "no-fpn")
    # the row can be added to a finished comparison
    added = load_comparison(config_file, tmp_path / "out", words[:2])
    assert added.claim == comparison.claim
    run = {run.name: run for run in make_plan(bare)}["detect/seed1/no-fpn"]
    assert run.needs == ("distill/seed1",)
    config = run_config(bare, run)
    assert str(tmp_path / "out" / "backbones" / "small-ce-s1.safetensors") == config.MODEL.WEIGHTS
    assert config.MODEL.BACKBONE.NAME == "build_timm_backbone"
    assert config.MODEL.RPN.IN_FEATURES == config.MODEL.ROI_HEADS.IN_FEATURES == ["res4"]
    assert config.MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64, 128, 256, 512]]
    assert config.SOLVER.BASE_LR == 0.125
    whole = config.clone()
    whole.defrost()
    whole.MODEL.WEIGHTS, whole.MODEL.ROI_HEADS.NUM_CLASSES = "", 2
    backbone = build_detector(whole).backbone
    assert {name: info.stride for name, info in backbone.output_shape().items()} == {"res4": 16}


def test_a_row_with_its_own_device_gets_a_gpu_or_none(config_file):
    words = ["DETECT.SCRATCH_OPTS", "[MODEL.DEVICE, cpu]"]
    wants = {run.row: run.wants_gpu for run in make_plan(load_comparison(config_file, overrides=words))}
    assert wants == {None: True, "scratch": False, "ce": True, "kd": True, "kd+nst-poly": True}
    words = ["DETECT.MODEL.DEVICE", "cpu", "DETECT.SCRATCH_OPTS", "[MODEL.DEVICE, cuda]"]
    wants = {run.row: run.wants_gpu for run in make_plan(load_comparison(config_file, overrides=words))}
    assert wants == {None: True, "scratch": True, "ce": False, "kd": False, "kd+nst-poly": False}
