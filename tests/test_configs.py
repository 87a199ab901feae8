"""Every config of the repository is read by its loader, so that none rots."""

import re
from pathlib import Path

import pytest
import torch

from nst_det.comparison.config import KEYS as COMPARE_KEYS
from nst_det.comparison.config import load_comparison
from nst_det.comparison.plan import DATA, make_plan, run_config
from nst_det.comparison.stages import check_distill_losses
from nst_det.detection.config import get_defaults as detect_defaults
from nst_det.detection.config import load_detect_config, voc_roots
from nst_det.detection.torchvision import build_detector
from nst_det.distillation.config import get_defaults as distill_defaults
from nst_det.distillation.config import load_distill_config
from nst_det.engine.config import expand_path, flat, read_yaml
from nst_det.engine.keys import config_tree
from nst_det.keys import find_keys
from nst_det.losses import parse_method
from nst_det.models import create_model
from nst_det.tune.config import KEYS as TUNE_KEYS
from nst_det.tune.config import load_tuning

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TORCHVISION = ["ENGINE", "torchvision"]
# what the files may read from the environment
VARIABLES = ("IMAGENET", "NST_DET_REAL_DATA", "NST_DET_SHAPES", "NST_DET_WEIGHTS", "VOC_ROOT")


def files(kind):
    found = sorted((CONFIGS / kind).rglob("*.yaml"))
    return pytest.mark.parametrize("file", found, ids=lambda path: str(path.relative_to(CONFIGS)))


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, str(tmp_path))


def is_base(file):
    return file.stem == "base" or file.stem.startswith("base_") or file.stem == "small_cpu"


def test_there_is_no_config_beside_the_known_kinds():
    found = {path.relative_to(CONFIGS).parts[0] for path in CONFIGS.rglob("*.yaml")}
    assert found == {"distill", "detect", "compare", "tune"}


@files("distill")
def test_distill(file):
    config = load_distill_config(file, ["DATA.ROOT", "somewhere"] if is_base(file) else [])
    for word in config.METHODS:
        assert parse_method(word).word == word
    assert not Path(config.DATA.ROOT).is_absolute()
    assert "$" not in expand_path(config.DATA.ROOT, "DATA.ROOT")


@files("detect")
def test_detect(file):
    # the torchvision engine takes no key that it doesn't know, so what it takes Detectron2 takes too
    config = load_detect_config(file, TORCHVISION)
    assert parse_method(config.METHOD).word == config.METHOD
    roots = voc_roots(config, [*config.DATASETS.TRAIN, *config.DATASETS.TEST], "DATASETS")
    assert is_base(file) or len(roots) >= 2
    if config.METHOD != "ce":
        teacher = load_detect_config(CONFIGS.parent / config.TEACHER.CONFIG_FILE, TORCHVISION)
        # the named weights are those that the teacher's own config writes
        assert Path(config.TEACHER.WEIGHTS).parent == Path(teacher.OUTPUT_DIR)
        assert teacher.DATASETS.TRAIN == config.DATASETS.TRAIN
    if file.parent.name in ("voc", "c4") and not is_base(file):
        images = {"voc07": 5011, "voc0712": 16551}[file.stem.split("_")[0]]
        assert config.SOLVER.MAX_ITER * config.SOLVER.IMS_PER_BATCH / images == pytest.approx(17.5, abs=0.2)


def engine_of(file):
    """Return the engine's key and value; a comparison of stage one alone has none."""
    return [] if file.stem.startswith("cifar10") else TORCHVISION


@pytest.mark.parametrize("file", [*CONFIGS.glob("detect/voc/*.yaml"), *CONFIGS.glob("detect/c4/*.yaml")], ids=str)
def test_a_detector_for_a_gpu_takes_what_it_has(file):
    config = load_detect_config(file, TORCHVISION)
    found = config.MODEL.DEVICE, config.SOLVER.AMP.ENABLED, config.CUDNN_BENCHMARK, config.DATALOADER.NUM_WORKERS
    assert found == ("auto", True, True, -1)


@pytest.mark.parametrize(
    "file", [*CONFIGS.glob("distill/imagenet*.yaml"), *CONFIGS.glob("distill/paper/*.yaml")], ids=str
)
def test_a_stage_one_for_a_gpu_takes_what_it_has(file):
    config = load_distill_config(file)
    assert (config.SOLVER.AMP.ENABLED, config.CUDNN_BENCHMARK) == (True, True)
    assert config.DATALOADER.NUM_WORKERS in (-1, 16)


@pytest.fixture
def published(monkeypatch):
    """Published weights are not looked for."""
    monkeypatch.setattr("nst_det.models.build.published_file", lambda arch: None)


@files("compare")
def test_compare(file, tmp_path, published):
    comparison = load_comparison(file, output=tmp_path / "out", overrides=engine_of(file))
    for node in (comparison.distill.TEACHER, comparison.distill.STUDENT):
        if node.WEIGHTS:
            path = Path(expand_path(node.WEIGHTS, "WEIGHTS"))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(create_model(node.ARCH, 2).state_dict(), path)
    check_distill_losses(comparison.distill, comparison.students, file.stem)
    runs = make_plan(comparison)
    before = set()
    for run in runs:
        assert before.issuperset(run.needs), run.name
        before.add(run.name)
        if run.kind != DATA:
            run_config(comparison, run)


def test_the_page_of_keys_is_what_the_command_writes(cli, tmp_path):
    assert cli("keys", "--output", tmp_path / "keys.md") == 0
    text = (tmp_path / "keys.md").read_text()
    assert text == (CONFIGS.parent / "docs" / "keys.md").read_text(), "nst-det keys --output docs/keys.md"
    # every key that a loader knows, whatever the table; free nodes are empty there
    for defaults in (distill_defaults(), detect_defaults(), config_tree(COMPARE_KEYS), config_tree(TUNE_KEYS)):
        leaves = [key for key in flat(defaults) if not key.startswith("TRANSFER.OPTIONS.")]
        assert len(leaves) >= 12
        assert [key for key in leaves if f"| `{key}` |" not in text] == []


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("SOLVER.MAX_ITER", {"distill.yaml": ["SOLVER.MAX_ITER"], "detect.yaml": ["SOLVER.MAX_ITER"]}),
        ("DETECT.TEST.SELECT", {"detect.yaml": ["TEST.SELECT"]}),
        ("distill.cache.dir", {"distill.yaml": ["CACHE.DIR"]}),
        ("VIEW_SEED", {"distill.yaml": ["CACHE.VIEW_SEED"]}),
        ("TRIALS", {"tune.yaml": ["TRIALS"]}),
    ],
)
def test_keys_are_found_by_how_they_begin(prefix, found):
    assert {group.file: list(keys) for group, keys in find_keys(prefix)} == found


def test_an_unknown_prefix_names_the_nearest(cli, capsys):
    assert cli("keys", "MAX_ITR") == 2
    assert "MAX_ITER" in capsys.readouterr().err
    assert cli("keys", "TEST.SELECT") == 0
    assert "'last' or 'best'" in " ".join(capsys.readouterr().out.split())


@files("tune")
def test_tune(file, tmp_path):
    tuning = load_tuning(file, tmp_path / "out", ["OPTS", f"[{', '.join(engine_of(file))}]"])
    assert tuning.spaces
    assert all(set(space.settings(space.default)["WEIGHTS"]) for space in tuning.spaces.values())


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_files_that_are_named_exist_and_variables_are_known(file):
    text = file.read_text()
    # the config in a command line of the head is the file itself, or one beside it
    for name in re.findall(r"configs/[\w/.]+\.yaml", text):
        assert (CONFIGS.parent / name).is_file(), name
    assert set(re.findall(r"\$\{?([A-Z][A-Z_0-9]*)", text)) <= set(VARIABLES)


def test_the_papers_students_can_be_built(tmp_path, published):
    file = CONFIGS / "compare" / "paper_imagenet.yaml"
    comparison = load_comparison(file, output=tmp_path / "out", overrides=TORCHVISION)
    check_distill_losses(comparison.distill, comparison.methods, "paper")
    distill, model = comparison.distill, comparison.detect.MODEL
    assert (distill.TEACHER.ARCH, distill.STUDENT.ARCH) == ("resnet101.tv_in1k", "inception_bn")
    assert dict(distill.STUDENT.ARCH_KWARGS) == dict(model.TIMM.KWARGS) == {"stride16_tap": "4b"}
    assert model.RPN.IN_FEATURES == model.ROI_HEADS.IN_FEATURES == ["res4"]
    detect = comparison.detect
    assert list(detect.DATASETS.TRAIN) == ["voc_2007_trainval", "voc_2012_trainval"]
    assert list(detect.DATASETS.TEST) == ["voc_2007_test"]
    assert detect.METHOD == "ce"


def test_the_papers_schedule_is_that_of_its_code():
    solver = load_distill_config(CONFIGS / "distill" / "paper" / "imagenet.yaml").SOLVER
    epoch = 1_281_167 // solver.IMS_PER_BATCH
    assert solver.IMS_PER_BATCH == 64 * 8
    assert epoch * 100 == solver.MAX_ITER
    assert list(solver.STEPS) == [30 * epoch, 60 * epoch, 90 * epoch]
    assert (solver.OPTIMIZER, solver.NESTEROV, solver.BASE_LR) == ("SGD", True, 0.1)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.GAMMA) == (0.9, 1e-4, 0.1)


def test_each_paper_config_trains_the_method_in_its_name():
    found = {}
    for file in sorted((CONFIGS / "distill" / "paper").glob("imagenet_*.yaml")):
        config = load_distill_config(file)
        found[file.stem.removeprefix("imagenet_")] = list(config.METHODS)
        own = read_yaml(file) | {"METHODS": [], "OUTPUT_DIR": ""}
        assert own == read_yaml(file.with_name("imagenet.yaml")) | {"METHODS": [], "OUTPUT_DIR": ""}
        assert config.OUTPUT_DIR.endswith(file.stem)
    assert found == {
        "ce": ["ce"],
        "kd": ["kd"],
        "fitnet": ["fitnet"],
        "at": ["at"],
        "nst_poly": ["nst-poly"],
        "kd_fitnet": ["kd+fitnet"],
        "kd_at": ["kd+at"],
        "kd_nst_poly": ["kd+nst-poly"],
    }


def test_table_3_goes_on_where_table_4_stopped():
    few, all_ = (
        load_comparison(CONFIGS / "compare" / f"paper_{name}.yaml", overrides=TORCHVISION)
        for name in ("voc07", "imagenet")
    )
    assert set(few.methods) == {"ce", "kd", "fitnet", "at", "nst-poly", "kd+nst-poly"}
    assert set(all_.methods) - set(few.methods) == {"kd+fitnet", "kd+at"}
    assert (few.folder, few.claim) == (all_.folder, all_.claim)


def test_the_papers_detector_reads_block_4b_and_its_scratch_row_trains():
    file = CONFIGS / "detect" / "c4" / "voc0712_inception_bn_c4.yaml"
    scratch = read_yaml(CONFIGS / "compare" / "paper_voc07.yaml")["DETECT"]["SCRATCH_OPTS"]
    small = ["MODEL.ROI_HEADS.NUM_CLASSES", "20", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.DEVICE", "cpu"]
    config = load_detect_config(file, [*map(str, scratch), *small])
    detector = build_detector(config)
    shapes = {name: (shape.channels, shape.stride) for name, shape in detector.backbone.output_shape().items()}
    assert shapes == {"res4": (576, 16)}
    detector.freeze(config.MODEL.BACKBONE.FREEZE_AT, config.MODEL.TIMM.NORM)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    objects = {"boxes": torch.tensor([[5.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([7])}
    losses = detector.train()([{"image": image, "height": 64, "width": 96, "image_id": "0", **objects}])
    sum(losses.values()).backward()
    bottom_up = dict(detector.backbone.named_parameters())
    assert bottom_up
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in bottom_up.values())
