import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from nst_det.comparison.plan import make_plan, run_config
from nst_det.comparison.stages import check_data_folders
from nst_det.data.folders import read_image_folder
from nst_det.data.voc import VocDataset
from nst_det.detection.config import load_detect_config
from nst_det.engine.config import flat, read_yaml
from nst_det.errors import UserError
from nst_det.scaffold.init import init_project

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, words)])
    return ended.value.code


@pytest.fixture
def voc(thirty, tmp_path):
    return Path(shutil.copytree(thirty, tmp_path / "voc"))


def test_thirty_images_become_a_comparison(voc, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("my_project", "--voc", "voc", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "nst-det compare --config-file my_project/compare.yaml" in said
    monkeypatch.chdir("/")
    comparison = load_comparison(tmp_path / "my_project" / "compare.yaml")
    runs = make_plan(comparison)
    for run in runs:
        run_config(comparison, run)
    # a teacher, three seeds of students, and of seven detectors
    assert len(runs) == 1 + 3 + 3 * 7
    check_data_folders(comparison.distill, comparison.detect, "here")
    assert comparison.folder == tmp_path / "my_project" / "output"
    detect = comparison.detect
    assert voc / "ImageSets" == Path(detect.DATASETS.VOC.own_train.ROOT) / "ImageSets"
    train = VocDataset(voc, "trainval")
    assert (detect.DATASETS.VOC.own_train.SPLIT, detect.DATASETS.VOC.own_test.SPLIT) == ("trainval", "test")
    assert tuple(detect.DATASETS.CLASSES) == train.classes
    assert detect.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert (detect.SOLVER.MAX_ITER, detect.SOLVER.IMS_PER_BATCH) == (150, 4)
    # anchors by hand; these images are 160 pixels at most already
    shapes = np.array([(a.width, a.height) for a in train.annotations()])
    assert round(float(np.median(shapes.min(axis=1)))) == detect.INPUT.MIN_SIZE_TEST
    assert detect.INPUT.MAX_SIZE_TEST == round(float(np.median(shapes.max(axis=1)))) <= 160
    sides, names = [], []
    for annotation in train.annotations():
        scale = detect.INPUT.MIN_SIZE_TEST / min(annotation.width, annotation.height)
        scale = min(scale, detect.INPUT.MAX_SIZE_TEST / max(annotation.width, annotation.height))
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.box
            if not item.difficult:
                sides.append(scale * ((xmax - xmin + 1) * (ymax - ymin + 1)) ** 0.5)
                names.append(item.name)
    # every class as often as the others: copies of each box, as many as make the classes equal
    times = np.lcm.reduce([names.count(name) for name in set(names)])
    copies = np.repeat(sides, [times // names.count(name) for name in names])
    wanted = [max(np.quantile(copies, q), s) for q, s in zip((0.1, 0.3, 0.5, 0.7, 0.9), (4, 8, 16, 32, 64))]
    anchors = detect.MODEL.ANCHOR_GENERATOR.SIZES
    np.testing.assert_allclose(np.array(anchors)[:, 0], wanted, atol=1.5)
    assert abs(detect.MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE - np.median(sides)) <= 0.75
    folder = read_image_folder(comparison.distill.DATA.ROOT)
    assert set(folder.classes) == {*train.classes, "background"}
    tested = set(VocDataset(voc, "test").ids)
    assert not {Path(path).stem.split("_")[0] for path in (*folder.train.paths, *folder.val.paths)} & tested


def test_the_detector_is_the_small_one_of_the_packaged_configs(thirty, tmp_path):
    project = init_project(tmp_path / "mine", thirty)
    own = flat(load_detect_config(tmp_path / "mine" / "detect.yaml"))
    packaged = flat(load_detect_config(CONFIGS / "detect" / "small_cpu.yaml"))
    differing = {key for key in own | packaged if own.get(key) != packaged.get(key)}
    fitted = {"MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE"}
    fitted |= {f"INPUT.{edge}_SIZE_{when}" for edge in ("MIN", "MAX") for when in ("TRAIN", "TEST")}
    fitted |= {"SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.CHECKPOINT_PERIOD", "OUTPUT_DIR"}
    assert {key for key in differing if not key.startswith("DATASETS.")} <= fitted
    assert "_BASE_" not in (tmp_path / "mine" / "detect.yaml").read_text()
    assert project.images == (24, 6)
    assert not project.cut


def test_without_lists_a_fifth_is_held_out_and_a_second_project_takes_the_same(voc, tmp_path):
    shutil.rmtree(voc / "ImageSets")
    project = init_project(tmp_path / "one", voc)
    assert project.cut
    assert project.images == (24, 6)
    train, test = (VocDataset(voc, name).ids for name in ("nst_det_train", "nst_det_test"))
    assert not set(train) & set(test)
    again = init_project(tmp_path / "two", voc)
    assert (again.values.train, again.values.test) == ("nst_det_train", "nst_det_test")
    assert not again.cut


def test_own_classification_data_is_taken(thirty, tmp_path):
    images = thirty.parent / "shapes_cls"
    init_project(tmp_path / "mine", thirty, images)
    assert read_yaml(tmp_path / "mine" / "distill.yaml")["DATA"]["ROOT"] == str(images)
    assert not (tmp_path / "mine" / "data").exists()


def test_names_that_yaml_would_read_otherwise(voc, tmp_path):
    """A class called ``no``, a folder with a colon and a quote."""
    for path in (voc / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<name>square</name>", "<name>no</name>"))
    odd = voc.rename(tmp_path / "it's: #1 {x}")
    init_project(tmp_path / "007", odd)
    tree = yaml.safe_load((tmp_path / "007" / "detect.yaml").read_text())
    assert tree["DATASETS"]["VOC"]["own_train"]["ROOT"] == str(odd)
    assert tuple(tree["DATASETS"]["CLASSES"]) == VocDataset(odd, "trainval").classes
    assert "no" in tree["DATASETS"]["CLASSES"]
    assert load_comparison(tmp_path / "007" / "compare.yaml").name == "007"


def test_bad_data_is_named_and_nothing_is_left(voc, tmp_path, capsys):
    image = next((voc / "JPEGImages").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    assert call(tmp_path / "mine", "--voc", voc) == 2
    said = capsys.readouterr().err.strip()
    assert f"unreadable image: JPEGImages/{image.name}" in said
    assert "nst-det check-data" in said
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["voc"]


def test_a_project_that_is_there_is_kept(thirty, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: is there already"):
        init_project(tmp_path / "mine", thirty)
    with pytest.raises(UserError, match="can't name a backbone"):
        init_project(tmp_path / "my project", thirty)
    with pytest.raises(UserError, match="no such folder"):
        init_project(tmp_path / "other", tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
