import hashlib
import re

import pytest
import yaml

from nst_det.cli import build_parser
from nst_det.comparison.config import Tuned, load_comparison, parse_row, read_tuned, row_weights
from nst_det.comparison.pipeline import compare, print_plan
from nst_det.comparison.plan import make_plan, run_config
from nst_det.distillation.config import transfer_of
from nst_det.engine.config import plain
from nst_det.errors import UserError
from tests.helpers.small_comparison import change
from tests.helpers.voc import obj, write, xml

TUNED = {
    "kd": {"trials": 8, "settings": {"WEIGHTS": {"kd": 2.5}}},
    "nst-poly+kd": {"trials": 8, "settings": {"LEVELS": ["res4"], "WEIGHTS": {"kd": 0.5, "nst-poly": 70.0}}},
    "cwd@det": {"trials": 4, "settings": {"LEVELS": ["p3"], "WEIGHTS": {"cwd": 3.0}}},
    "at": {"trials": 8, "settings": {"WEIGHTS": {"at": 9.0}}},
}


@pytest.fixture
def tuned_file(tmp_path):
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump({"budget": {"trials": 8}, "methods": TUNED}))
    return path


def test_methods_become_canonical_and_ce_is_always_among_them(config_file):
    change(config_file, METHODS=["nst-poly+kd", "kd", "ce"], SEEDS=[2, 0])
    comparison = load_comparison(config_file)
    assert tuple(comparison.methods) == ("ce", "kd+nst-poly", "kd")
    assert comparison.all_rows == ("scratch", "ce", "kd+nst-poly", "kd")
    assert comparison.seeds == (0, 2)
    assert comparison.folder.parts[-2:] == ("output", "small")


def test_keys_of_a_stage_are_handed_on(config_file):
    change(config_file, DISTILL={"CONFIG": "distill.yaml", "OPTS": ["SOLVER.MAX_ITER", 7, "SOLVER.BASE_LR", 0.5]})
    words = ["DISTILL.SOLVER.MAX_ITER", "9", "SEEDS", "[3]", "DETECT.SOLVER.BASE_LR", "1e-4"]
    words += ["DISTILL.TEACHER.SOLVER.BASE_LR", "0.7", "DETECT.DATASETS.VOC.own_test.ROOT", "there"]
    words += ["DETECT.SCRATCH_OPTS", "[SOLVER.BACKBONE_MULTIPLIER, 0.25]"]
    comparison = load_comparison(config_file, overrides=words)
    assert comparison.distill.TEACHER.SOLVER.BASE_LR == 0.7
    assert comparison.detect.DATASETS.VOC.own_test.ROOT == "there"
    # OPTS come below the command line
    assert (comparison.distill.SOLVER.MAX_ITER, comparison.distill.SOLVER.BASE_LR) == (9, 0.5)
    assert comparison.detect.SOLVER.BASE_LR == 1e-4
    assert comparison.seeds == (3,)
    assert comparison.row_opts["scratch"] == ("SOLVER.BACKBONE_MULTIPLIER", "0.25")
    claim = comparison.claim
    assert (claim["NAME"], claim["ENGINE"], claim["THREADS"]) == ("small", "torchvision", 2)
    assert claim["DISTILL.SOLVER.MAX_ITER"] == 9
    assert claim["DETECT.SCRATCH_OPTS"] == ["SOLVER.BACKBONE_MULTIPLIER", 0.25]
    free = {"METHODS", "SEEDS", "ROWS", "TUNED", "JOBS", "OUTPUT_DIR", "DISTILL.SEED", "DISTILL.OPTS", "DETECT.CONFIG"}
    # compared with the teacher's accuracy at each start
    free.add("DISTILL.TEACHER.EXPECTED_TOP1")
    # known by their fingerprints
    paths = {"DISTILL.DATA.ROOT", "DETECT.DATASETS.VOC.own_test.ROOT", "DISTILL.TEACHER.WEIGHTS", "DISTILL.CACHE.DIR"}
    assert not {*free, *paths, "DETECT.MODEL.WEIGHTS", "DETECT.MODEL.DEVICE", "DISTILL.NAME"} & set(claim)


BAD = [
    ("DISTILL.SOLVER.MAX_ITR 9", "unknown key DISTILL.SOLVER.MAX_ITR; did you mean DISTILL.SOLVER.MAX_ITER"),
    ("DETECT.SOLVR.X 9", "unknown key DETECT.SOLVR"),
    ("DETECT.SOLVER.MAX_ITER many", "DETECT.SOLVER.MAX_ITER"),
    ("METHOD [kd]", "unknown key METHOD; did you mean METHODS"),
    ("METHODS kd,nst-cubic", "compare.yaml: METHODS: method 'nst-cubic'"),
    ("METHODS [kd,nst-cubic]", "compare.yaml: METHODS: method 'nst-cubic'"),
    ("METHODS [kd,kd]", "compare.yaml: METHODS"),
    ("METHODS [nst-poly+kd,at,kd+nst-poly]", "compare.yaml: METHODS"),
    ("METHODS [ce@det]", "METHODS: method 'ce@det'"),
    ("METHODS [cwd@det] DETECT.METHOD pkd", "DETECT.METHOD pkd"),
    ("SEEDS [2,0,2]", "compare.yaml: SEEDS"),
    ("SEEDS [-1]", "compare.yaml: SEEDS"),
    ("SEEDS [True]", "compare.yaml: SEEDS"),
    ("SEEDS True", "SEEDS"),
    ("SEEDS 0,x", "compare.yaml: SEEDS"),
    ("SEEDS []", "compare.yaml: SEEDS"),
    ("SEEDS", "'SEEDS' has no value"),
    ("ROWS ['stock']", "compare.yaml: ROWS"),
    ("ROWS [no-fpn] DETECT.MODEL.BACKBONE.NAME build_timm_backbone DETECT.MODEL.RPN.IN_FEATURES [res4] "
     "DETECT.MODEL.ROI_HEADS.IN_FEATURES [res4]", "ROWS: no-fpn: DETECT.MODEL.BACKBONE.NAME"),
    ("ENGINE mmdet", "compare.yaml: ENGINE 'mmdet'"),
    ("NAME ../up", "compare.yaml: NAME"),
    ("JOBS -1", "compare.yaml: JOBS"),
    ("THREADS -1", "compare.yaml: THREADS"),
    *((f"{key} 7", f"command line: {key}") for key in ("DISTILL.SEED", "DISTILL.METHODS", "DETECT.MODEL.WEIGHTS")),
    ("DETECT.OPTS [ENGINE,detectron2]", "compare.yaml: DETECT.OPTS: ENGINE"),
    *((f"DETECT.{row}_OPTS [SOLVER.BASE_LR,0.1,{key},3]", f"compare.yaml: DETECT.{row}_OPTS: {key}")
      for row in ("SCRATCH", "IMAGENET", "COCO", "NO_FPN", "TEACHER") for key in ("SEED", "OUTPUT_DIR")),
    *((f"DETECT.{row}_OPTS [MODEL.WEIGHTS,3]", f"compare.yaml: DETECT.{row}_OPTS: MODEL.WEIGHTS")
      for row in ("SCRATCH", "NO_FPN", "TEACHER")),
    ("DETECT.TEACHER_OPTS [MODEL.TIMM.ARCH,resnet18]", "DETECT.TEACHER_OPTS: MODEL.TIMM.ARCH: a comparison sets it for "
     "each run; leave it out, or set DISTILL.TEACHER.ARCH"),
    ("DETECT.TEACHER_OPTS [MODEL.TIMM.KWARGS,{}]", "or set DISTILL.TEACHER.ARCH_KWARGS"),
    ("DETECT.TEACHER_OPTS [MODEL.TIMM.KWARGS.drop_rate,0.1]", "or set DISTILL.TEACHER.ARCH_KWARGS"),
    ("DETECT.TEACHER_OPTS [MODEL.WEIGHTS,3]", "MODEL.WEIGHTS: a comparison sets it for each run; leave it out, or set "
     "DISTILL.TEACHER.WEIGHTS"),
    ("DATA.GENERATE {'seed':0} DETECT.SCRATCH_OPTS [DATASETS.VOC.own_test.ROOT,x]", "SCRATCH_OPTS: DATASETS.VOC"),
    ("DATA.GENERATE {'seed':0} DISTILL.DATA.ROOT my_images", "command line: DISTILL.DATA.ROOT"),
    ("DATA.GENERATE {'seed':0} DETECT.DATASETS.VOC.own_test.ROOT x", "command line: DETECT.DATASETS.VOC.own_test.ROOT"),
    ("DETECT.MODEL.DEVICE cuda:1", "compare.yaml: DETECT.MODEL.DEVICE cuda:1"),
    ("DETECT.TEACHER_OPTS [MODEL.DEVICE,'cuda:12']", "compare.yaml: DETECT.MODEL.DEVICE cuda:12"),
    ("DISTILL.CONFIG none.yaml", "none.yaml: no such config file"),
    ("DISTILL.CONFIG ''", "compare.yaml: DISTILL.CONFIG"),
    ("DISTILL.CONFIG $NOT_SET_HERE/one.yaml", "DISTILL.CONFIG: the environment variable NOT_SET_HERE"),
    ("DETECT.SCRATCH_OPTS ['SOLVER.NOPE','1']", "DETECT.SCRATCH_OPTS: unknown key SOLVER.NOPE"),
    ("DETECT.MODEL.TIMM.ARCH resnet18", "nst_resnet10_w32 (DISTILL.STUDENT.ARCH), stage two expects resnet18"),
    ("DETECT.MODEL.PIXEL_STD [1.0,1.0,1.0]", "DETECT.MODEL.PIXEL_MEAN, PIXEL_STD"),
    ("DETECT.INPUT.FORMAT BGR", "INPUT.FORMAT"),
    ("DATA.GENERATE {'pictures':4}", "DATA.GENERATE: unknown setting pictures"),
    ("DATA.GENERATE {'detection_images':0}", "DATA.GENERATE: detection_images"),
    ("DATA.GENERATE {'seed':0} DATA.ROOT FOLDER/other", "other: holds data made with seed 4"),
]  # fmt: skip
# found by comparing, before the first run
BAD_FOR_A_STAGE = [
    ("DISTILL.DATA.ROOT /nowhere", "DISTILL.DATA.ROOT: no folder '/nowhere'"),
    ("DISTILL.DATA.ROOT $NOT_SET_HERE/x", "DISTILL.DATA.ROOT: the environment variable NOT_SET_HERE"),
    ("DETECT.DATASETS.VOC.own_test.ROOT /nowhere", "DETECT.DATASETS.VOC.own_test.ROOT: no folder"),
    ("DETECT.DATASETS.TEST []", "small: DETECT.DATASETS.TEST names no data set"),
    ("DETECT.DATASETS.TEST [own_tset]", "DETECT.DATASETS.TEST: no data set 'own_tset'"),
    ("DETECT.DATASETS.TEST [own_test,own_train]", "small: DETECT.DATASETS.TEST: the torchvision engine"),
    ("DISTILL.TRANSFER.LEVELS ['res9']", "DISTILL: TRANSFER"),
    ("DISTILL.STUDENT.ARCH resnet11 DETECT.MODEL.TIMM.ARCH resnet11", "DISTILL: STUDENT.ARCH"),
    ("DISTILL.TEACHER.WEIGHTS gone.safetensors", "gone.safetensors"),
    ("DISTILL.SOLVER.BASE_LR -1.0", "run teacher: stage one: SOLVER.BASE_LR"),
    ("DETECT.MODEL.FPN.FUSE_TYPE max", "MODEL.FPN.FUSE_TYPE 'max'"),
    ("METHODS [cwd@det] DETECT.TRANSFER.LEVELS [p9]", "small: row cwd@det: DETECT: TRANSFER"),
]


@pytest.mark.parametrize(("words", "named"), BAD + BAD_FOR_A_STAGE)
def test_what_cannot_be_used_is_named_in_one_line(config_file, tmp_path, words, named):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text('{"seed": 4}')
    words = words.replace("FOLDER", str(tmp_path)).replace("''", "").split(" ")
    with pytest.raises(UserError, match=re.escape(named)) as caught:  # noqa: PT012
        comparison = load_comparison(config_file, tmp_path / "out", words)
        compare(comparison, 1, lambda *_: pytest.fail("a run was started"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "compare FOLDER --seeds 3,1 --methods kd,nst-poly+kd --rows teacher",
        "compare --seeds 3,1 --methods kd,nst-poly+kd --rows teacher FOLDER",
        "compare FOLDER --rows teacher SEEDS 3,1 METHODS kd,nst-poly+kd",
        "compare FOLDER/compare.yaml SEEDS [3,1] METHODS [kd,nst-poly+kd] ROWS teacher",
        "compare --config-file FOLDER/compare.yaml --rows teacher SEEDS (3,1) METHODS ['kd','nst-poly+kd']",
    ],
)
def test_a_folder_and_lists_without_brackets(config_file, words):
    args = build_parser().parse_args(words.replace("FOLDER", str(config_file.parent)).split(" "))
    comparison = load_comparison(args.config_file, args.output, args.overrides)
    assert (comparison.seeds, tuple(comparison.methods), comparison.rows) == (
        (1, 3), ("ce", "kd", "kd+nst-poly"), ("scratch", "teacher"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("word", "name"),
    [("compare", "compare.yaml"), ("tune", "tune.yaml"), ("distill", "distill.yaml"), ("train-det", "detect.yaml")],
)
def test_a_folder_without_the_config_is_named(tmp_path, cli, capsys, word, name):
    assert cli(word, tmp_path) == 2
    assert f"{tmp_path}: no {name}" in capsys.readouterr().err
    assert cli(word) == 2
    assert "PROJECT" in capsys.readouterr().err
    # keys without a config
    assert cli(word, "DATA.ROOT", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in ("DATA.ROOT: ", "project", "YAML"))


def test_stage_files_are_relative_to_the_comparison_or_from_the_environment(config_file, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "distill.yaml").rename(tmp_path / "elsewhere" / "one.yaml")
    change(config_file, DISTILL={"CONFIG": "$MY_CONFIGS/one.yaml"})
    monkeypatch.setenv("MY_CONFIGS", str(tmp_path / "elsewhere"))
    assert load_comparison(config_file).distill.SOLVER.MAX_ITER == 6


def change_input(config_file, **values):
    """Set keys of INPUT in the YAML of stage two."""
    file = config_file.with_name("detect.yaml")
    change(file, INPUT={**yaml.safe_load(file.read_text())["INPUT"], **values})


@pytest.mark.parametrize(
    ("in_file", "words", "expected"),
    [
        ({"AUGMENTATION": "voc"}, "DETECT.INPUT.AUGMENTATION none", (False, [], 0.0, 0.0)),
        ({"AUGMENTATION": "voc"}, "DETECT.INPUT.AUGMENTATION strong", (False, [0.1, 2.0], 0.5, 0.1)),
        ({"PHOTOMETRIC": 0.25}, "DETECT.INPUT.AUGMENTATION voc", (True, [0.8, 1.25], 0.25, 0.1)),
        ({}, "DETECT.INPUT.MIN_VISIBLE 0.5 DETECT.INPUT.AUGMENTATION strong", (False, [0.1, 2.0], 0.5, 0.5)),
        ({}, "DETECT.OPTS [INPUT.AUGMENTATION,voc] DETECT.INPUT.AUGMENTATION none", (False, [], 0.0, 0.0)),
        ({}, "DETECT.SCRATCH_OPTS [INPUT.AUGMENTATION,voc,INPUT.PHOTOMETRIC,0.0]", (True, [0.8, 1.25], 0.0, 0.1)),
    ],
)
def test_another_augmentation_on_top_brings_what_it_is_short_for(config_file, in_file, words, expected):
    change_input(config_file, **in_file)
    comparison = load_comparison(config_file, overrides=words.split(" "))
    given = run_config(comparison, next(run for run in make_plan(comparison) if run.row == "scratch")).INPUT
    assert expected == (given.CROP.ENABLED, given.SCALE_JITTER, given.PHOTOMETRIC, given.MIN_VISIBLE)


def test_the_weights_of_stage_one_are_known_with_generated_data_too(config_file, tmp_path):
    (tmp_path / "begin.pth").write_bytes(b"begin")
    words = ["DATA.GENERATE", "{'seed': 0}", "DISTILL.STUDENT.WEIGHTS", str(tmp_path / "begin.pth")]
    assert load_comparison(config_file, overrides=words[:2]).inputs() == {}
    digest = hashlib.sha256(b"begin").hexdigest()
    assert load_comparison(config_file, overrides=words).inputs() == {"DISTILL.STUDENT.SHA256": digest}


@pytest.mark.detectron2
def test_on_the_detectron2_engine_all_its_keys_are_known(config_file):
    pytest.importorskip("detectron2")
    words = ["ENGINE", "detectron2", "DETECT.MODEL.RPN.NMS_THRESH", "0.6", "DETECT.MODEL.RESNETS.DEPTH", "34"]
    comparison = load_comparison(config_file, overrides=words)
    assert comparison.engine == "detectron2"
    change_input(config_file, AUGMENTATION="voc")
    assert load_comparison(config_file, overrides=words).detect.INPUT.SCALE_JITTER == [0.8, 1.25]
    assert comparison.detect.MODEL.RESNETS.DEPTH == 34
    assert comparison.detect.MODEL.TIMM.ARCH == "nst_resnet10_w32"
    with pytest.raises(UserError, match=r"unknown key DETECT\.MODEL\.RESNET"):
        load_comparison(config_file, overrides=["ENGINE", "detectron2", "DETECT.MODEL.RESNET.DEPTHS", "34"])


BUILT_IN = ["DETECT.DATASETS.TRAIN", "[voc_2007_trainval]", "DETECT.DATASETS.TEST", "[voc_2007_test]"]


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["DETECT.SOLVER.ACCUMULATE", "2"], "SOLVER.ACCUMULATE"),
        (["DETECT.SOLVER.COMPILE", "default"], "SOLVER.COMPILE"),
        (["DETECT.TEST.AMP", "True"], "TEST.AMP"),
        (["DETECT.TEST.PATIENCE", "3"], "TEST.PATIENCE"),
        (
            ["DETECT.MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "DETECT.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE", "96"],
            "MODEL.ROI_BOX_HEAD",
        ),
        (["DETECT.DATASETS.TEST", "[nowhere]"], "nowhere"),
        ([*BUILT_IN, "DETECT.DATASETS.VAL_FRACTION", "0.2"], "DATASETS.VAL_FRACTION"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_detectron2_engine_refuses_is_refused_before_stage_one(config_file, words, named):
    pytest.importorskip("detectron2")
    comparison = load_comparison(config_file, overrides=["ENGINE", "detectron2", *words])
    with pytest.raises(UserError, match=re.escape(named)):
        print_plan(comparison)


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_a_class_that_is_tested_but_not_trained_is_refused_before_stage_one(config_file, engine):
    if engine == "detectron2":
        pytest.importorskip(engine)
    write(config_file.parent / "voc" / "Annotations" / "test.xml", xml(obj("ring")))
    with pytest.raises(UserError, match=r"DATASETS\.TEST own_test: .*test\.xml.*ring"):
        print_plan(load_comparison(config_file, overrides=["ENGINE", engine]))


@pytest.mark.parametrize(
    ("word", "canonical", "backbone", "detector"),
    [
        ("ce", "ce", "ce", "ce"),
        ("nst-poly+kd", "kd+nst-poly", "kd+nst-poly", "ce"),
        ("ce+cwd@det", "cwd@det", "ce", "cwd"),
        ("cwd@det:5", "cwd@det:5", "ce", "cwd:5"),
        (" CWD@det : 5", "cwd@det:5", "ce", "cwd:5"),
        ("nst-poly@det+kd:0.9+cwd@det:2", "kd:0.9+nst-poly@det+cwd@det:2", "kd:0.9", "nst-poly+cwd:2"),
        ("nst-poly+nst-poly@det", "nst-poly+nst-poly@det", "nst-poly", "nst-poly"),
    ],
)
def test_method_strings_are_parted_by_stage(word, canonical, backbone, detector):
    row = parse_row(word)
    assert (row.word, row.backbone.word, row.detector.word) == (canonical, backbone, detector)
    assert parse_row(row.word) == row


BAD_METHODS = "ce@det cwd@detector cwd:5@det cwd@det@det @det kd@ kd+ cwd@det+cwd@det nst-polly@det"


@pytest.mark.parametrize("word", ["", *BAD_METHODS.split()])
def test_other_method_strings_are_refused(word):
    with pytest.raises(ValueError, match="method|term"):
        parse_row(word)


def test_a_method_of_its_own_settings_may_be_left_out(config_file, tmp_path):
    own = {"nst-poly": {"LEVELS": ["res4"]}, "kd": {"WEIGHTS": {"kd": 3.0}}}
    change(tmp_path / "distill.yaml", TRANSFER={"BY_METHOD": own})
    comparison = load_comparison(config_file, overrides=["METHODS", "[kd]"])
    runs = {run.name: run for run in make_plan(comparison)}
    assert transfer_of(run_config(comparison, runs["distill/seed0"]), "kd").WEIGHTS.kd == 3.0


def test_each_method_runs_with_what_a_search_found_for_it(config_file, tuned_file):
    words = ["METHODS", "[kd, kd+nst-poly, fitnet, cwd@det, pkd@det]", "TUNED", str(tuned_file)]
    comparison = load_comparison(config_file, overrides=words)
    runs = {run.name: run for run in make_plan(comparison)}
    students = run_config(comparison, runs["distill/seed0"])
    assert plain(transfer_of(students, "kd").WEIGHTS) == {"kd": 2.5}
    assert transfer_of(students, "kd+nst-poly").LEVELS == ["res4"]
    assert plain(transfer_of(students, "kd+nst-poly").WEIGHTS) == {"kd": 0.5, "nst-poly": 70.0}
    assert transfer_of(students, "fitnet").LEVELS == comparison.distill.TRANSFER.LEVELS
    # of methods that aren't compared nothing is handed on
    assert "at" not in students.TRANSFER.BY_METHOD
    config = run_config(comparison, runs["detect/seed1/cwd@det"])
    assert (config.METHOD, config.TRANSFER.LEVELS, plain(config.TRANSFER.WEIGHTS)) == ("cwd", ["p3"], {"cwd": 3.0})
    untuned = run_config(comparison, runs["detect/seed1/pkd@det"]).TRANSFER
    assert (untuned.LEVELS, plain(untuned.WEIGHTS)) == (["p2", "p3", "p4", "p5"], {})
    # rows without terms of stage two are what they are without the file
    assert runs["detect/seed0/kd"].options == ()


def test_tuned_is_relative_to_the_comparison_and_may_be_added_to_a_finished_one(config_file, tuned_file):
    before = load_comparison(config_file).claim
    change(config_file, TUNED="tuned.yaml")
    comparison = load_comparison(config_file)
    assert comparison.tuned["kd+nst-poly"] == Tuned(TUNED["nst-poly+kd"]["settings"], 8)
    assert comparison.claim == before


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "methods"),
        ({"methods": {"nst-polly": {"trials": 1, "settings": {}}}}, "nst-polly"),
        ({"methods": {"kd": {"trials": 1}}}, "kd"),
        ({"methods": {"kd": {"trials": 1, "settings": {"SOLVER": {}}}}}, "kd"),
        ({"methods": {"kd": {"trials": "8", "settings": {}}}}, "kd"),
    ],
)
def test_a_bad_file_of_a_search_is_named(tmp_path, content, named):
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=rf"x\.yaml: .*{named}"):
        read_tuned(path)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("ce", ""),
        ("kd", "tuned (8 trials): kd"),
        ("kd:2", "configured: kd"),
        ("fitnet", "configured: fitnet 3"),
        ("nst-gaussian", "default: nst-gaussian"),
        ("fitnet+nst-linear", "configured: fitnet 3; default: nst-linear"),
        ("vid", "auto: vid"),
        ("kd+cwd@det", "tuned (8 trials): kd; default: cwd@det 10"),
        ("cwd@det", "tuned (4 trials): cwd@det 10"),
        ("pkd@det", "configured: pkd@det"),
    ],
)
def test_where_the_weights_of_a_row_are_from(tuned_file, word, text):
    # a configured number that is the default is no one's choice
    distill = {"WEIGHTS": {"fitnet": 3.0, "kd": 1.0, "nst-gaussian": 100.0}, "AUTO_WEIGHT": {"vid": 0.5}}
    nodes, found = (distill, {"WEIGHTS": {"pkd": 1.0}}), ({"fitnet": 3.0}, {"cwd": 10.0})
    weights = row_weights(parse_row(word), read_tuned(tuned_file), nodes, found)
    assert "; ".join(text_of(weights)) == text


def text_of(weights):
    """The sources in their order, each with its terms, by hand."""
    sources = dict.fromkeys((one.source, one.trials) for one in weights)
    for source, trials in sources:
        terms = [one for one in weights if one.source == source]
        names = ", ".join(one.term if one.weight is None else f"{one.term} {one.weight:g}" for one in terms)
        yield f"{source}{f' ({trials} trials)' if trials else ''}: {names}"
