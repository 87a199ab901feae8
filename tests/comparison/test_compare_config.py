import pytest
import yaml

from nst_det.comparison.config import load_comparison
from nst_det.errors import UserError


def change(file, **changes):
    tree = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(tree | changes))


def test_methods_become_canonical_and_ce_is_always_among_them(config_file):
    change(config_file, METHODS=["nst-poly+kd", "kd", "ce"], SEEDS=[2, 0])
    comparison = load_comparison(config_file)
    assert tuple(comparison.methods) == ("ce", "kd+nst-poly", "kd")
    assert comparison.all_rows == ("scratch", "ce", "kd+nst-poly", "kd")
    assert comparison.seeds == (0, 2)
    assert comparison.folder.parts[-2:] == ("output", "small")


def test_keys_of_a_stage_are_handed_on(config_file):
    words = ["DISTILL.SOLVER.MAX_ITER", "9", "SEEDS", "[3]", "DETECT.SOLVER.BASE_LR", "1e-4"]
    words += ["DISTILL.TEACHER.SOLVER.BASE_LR", "0.7", "DETECT.DATASETS.VOC.own_test.ROOT", "there"]
    comparison = load_comparison(config_file, overrides=words)
    assert comparison.distill.TEACHER.SOLVER.BASE_LR == 0.7
    assert comparison.detect.DATASETS.VOC.own_test.ROOT == "there"
    assert comparison.distill.SOLVER.MAX_ITER == 9
    assert comparison.detect.SOLVER.BASE_LR == 1e-4
    assert comparison.seeds == (3,)
    assert comparison.claim["DISTILL.SOLVER.MAX_ITER"] == 9
    assert not {"METHODS", "SEEDS", "JOBS", "DISTILL.SEED", "DETECT.MODEL.WEIGHTS"} & set(comparison.claim)


def test_lists_on_the_command_line_need_no_quotes(config_file):
    words = ["METHODS", "[ce, nst-poly:50, kd]", "SEEDS", "[0, 1, 2]"]
    words += ["DETECT.SCRATCH_OPTS", "[SOLVER.BACKBONE_MULTIPLIER, 0.25]"]
    comparison = load_comparison(config_file, overrides=words)
    assert tuple(comparison.methods) == ("ce", "nst-poly:50", "kd")
    assert comparison.row_opts["scratch"] == ("SOLVER.BACKBONE_MULTIPLIER", "0.25")


def test_opts_come_below_the_command_line(config_file):
    change(config_file, DISTILL={"CONFIG": "distill.yaml", "OPTS": ["SOLVER.MAX_ITER", 7, "SOLVER.BASE_LR", 0.5]})
    comparison = load_comparison(config_file, overrides=["DISTILL.SOLVER.MAX_ITER", "9"])
    assert (comparison.distill.SOLVER.MAX_ITER, comparison.distill.SOLVER.BASE_LR) == (9, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DISTILL.SOLVER.MAX_ITR", "9"], r"DISTILL\.SOLVER\.MAX_ITR; did you mean DISTILL\.SOLVER\.MAX_ITER"),
        (["DETECT.SOLVR.X", "9"], r"unknown key DETECT\.SOLVR"),
        (["DETECT.SOLVER.MAX_ITER", "many"], r"DETECT\.SOLVER\.MAX_ITER must be of type int"),
        (["METHOD", "[kd]"], "unknown key METHOD; did you mean METHODS"),
        (["METHODS", "kd"], "METHODS must be of type list"),
        (["METHODS", "[kd, nst-cubic]"], "METHODS: method 'nst-cubic'"),
        (["METHODS", "[kd, kd]"], "METHODS: kd is in it twice; leave one out"),
        (["METHODS", "[nst-poly+kd, at, kd+nst-poly]"], r"METHODS: kd\+nst-poly is in it twice"),
        (["SEEDS", "[2, 0, 2]"], "SEEDS: 2 is in it twice"),
        (["METHODS", "[ce@det]"], "METHODS: method 'ce@det'"),
        (["METHODS", "[cwd@det]", "DETECT.METHOD", "pkd"], "DETECT.METHOD pkd is for every row"),
        (["SEEDS", "[-1]"], "SEEDS must be a list of whole numbers"),
        (["SEEDS", "[]"], "SEEDS must be a list of whole numbers"),
        (["ROWS", "['stock']"], "ROWS: unknown row 'stock'"),
        (["ENGINE", "mmdet"], "ENGINE 'mmdet' is not one of"),
        (["NAME", "../up"], "NAME: '../up' can't name a backbone"),
        (["JOBS", "-1"], "JOBS and THREADS can't be negative"),
        (["SEEDS"], "'SEEDS' has no value"),
        (["DISTILL.CONFIG", "none.yaml"], "none.yaml: no such config file"),
        (["DETECT.SCRATCH_OPTS", "['SOLVER.NOPE', '1']"], r"DETECT\.SCRATCH_OPTS: unknown key SOLVER\.NOPE"),
        (["DETECT.MODEL.TIMM.ARCH", "resnet18"], r"stage one trains nst_resnet10_w32 .* stage two expects resnet18"),
        (["DETECT.MODEL.PIXEL_STD", "[1.0,1.0,1.0]"], r"PIXEL_STD .*std is \(0\.003922, 0\.003922, 0\.003922\)"),
        (["DETECT.INPUT.FORMAT", "BGR"], "trained on RGB images, now they are BGR"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(config_file, words, message):
    with pytest.raises(UserError, match=message) as caught:
        load_comparison(config_file, overrides=words)
    assert "\n" not in str(caught.value)


def test_stage_files_are_relative_to_the_comparison_or_from_the_environment(config_file, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "distill.yaml").rename(tmp_path / "elsewhere" / "one.yaml")
    change(config_file, DISTILL={"CONFIG": "$MY_CONFIGS/one.yaml"})
    with pytest.raises(UserError, match=r"DISTILL\.CONFIG: the environment variable MY_CONFIGS is not set"):
        load_comparison(config_file)
    monkeypatch.setenv("MY_CONFIGS", str(tmp_path / "elsewhere"))
    assert load_comparison(config_file).distill.SOLVER.MAX_ITER == 6
    change(config_file, DISTILL={"CONFIG": ""})
    with pytest.raises(UserError, match=r"DISTILL\.CONFIG names no file"):
        load_comparison(config_file)


@pytest.mark.detectron2
def test_on_the_detectron2_engine_all_its_keys_are_known(config_file):
    pytest.importorskip("detectron2")
    words = ["ENGINE", "detectron2", "DETECT.MODEL.RPN.NMS_THRESH", "0.6", "DETECT.MODEL.RESNETS.DEPTH", "34"]
    comparison = load_comparison(config_file, overrides=words)
    assert comparison.engine == "detectron2"
    assert comparison.detect.MODEL.RESNETS.DEPTH == 34
    assert comparison.detect.MODEL.TIMM.ARCH == "nst_resnet10_w32"
    with pytest.raises(UserError, match=r"unknown key DETECT\.MODEL\.RESNET"):
        load_comparison(config_file, overrides=["ENGINE", "detectron2", "DETECT.MODEL.RESNET.DEPTHS", "34"])
