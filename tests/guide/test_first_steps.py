"""What a new user does with images in each of the layouts that people have, with steps that take no time."""

import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

import nst_det
from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data
from nst_det.data.voc import VocDataset
from nst_det.detection.config import load_detect_config
from nst_det.detection.pipeline import train_detector
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from tests.guide import shim
from tests.helpers.small_comparison import RunsHere
from tests.helpers.voc import write

COUNTS = {"classification_images": 3, "classification_val_images": 3, "classification_classes": 3}
SIXTY = GenerateSettings(**COUNTS, detection_images=48, detection_test_images=12, detection_classes=3)


@pytest.fixture(scope="module")
def sixty(tmp_path_factory):
    """60 images in VOC layout (not to be written to)."""
    return generate_data(tmp_path_factory.mktemp("sixty") / "data", SIXTY, workers=1) / DETECTION


def examples(voc):
    """Id, image file, annotation file and annotation of each image, and whether it is one to train on."""
    for split in ("trainval", "test"):
        data = VocDataset(voc, split)
        for annotation in data.annotations():
            id_ = annotation.id
            yield id_, data.image_path(id_), data.annotation_path(id_), annotation, split == "trainval"


def as_xml(voc, root, images, annotations):
    for _, image, xml, _, learned in examples(voc):
        split = "train" if learned else "test"
        for source, place in ((image, images), (xml, annotations)):
            target = root / place.format(split) / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def as_yolo(voc, root):
    names = VocDataset(voc, "trainval").classes
    for id_, image, _, annotation, _ in examples(voc):
        shutil.copy(image, write(root / "images" / image.name))
        corners = annotation.boxes / ([annotation.width, annotation.height] * 2)
        middle, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        rows = zip(annotation.names, np.hstack([middle, size]).tolist())
        text = "\n".join(f"{names.index(name)} {' '.join(map(str, row))}" for name, row in rows)
        write(root / "labels" / f"{id_}.txt", text)
    write(root / "data.yaml", f"train: images\nval: images\nnames: {json.dumps(names)}\n")


def as_coco(voc, root):
    names = VocDataset(voc, "trainval").classes
    tree = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    for number, (_, image, _, annotation, _) in enumerate(examples(voc)):
        shutil.copy(image, write(root / "images" / image.name))
        size = {"width": annotation.width, "height": annotation.height}
        tree["images"].append({"id": number, "file_name": image.name, **size})
        for name, (x0, y0, x1, y1) in zip(annotation.names, annotation.boxes.tolist()):
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
            entry = {"id": len(tree["annotations"]), "image_id": number, "category_id": names.index(name)}
            tree["annotations"].append(entry | box)
    write(root / "annotations.json", json.dumps(tree))


# how a folder is made, and what follows `nst-det init my_project`
LAYOUTS = {
    "VOC": (lambda *given: as_xml(*given, "JPEGImages", "Annotations"), "--voc my_images"),
    "labelImg": (lambda *given: as_xml(*given, ".", "."), "--voc my_images"),
    "Roboflow": (lambda *given: as_xml(*given, "{}", "{}"), "--voc my_images"),
    "lower-case": (lambda *given: as_xml(*given, "images", "annotations"), "--voc my_images"),
    "YOLO": (as_yolo, "--voc my_images"),
    "COCO": (as_coco, "--coco my_images/annotations.json --images my_images/images"),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of a new user, who types commands there."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NST_DET_BACKBONES", str(tmp_path / "registry"))
    return folder


@pytest.fixture
def started(monkeypatch):
    """The runs that comparisons start, which are done in this process."""
    names = []

    class Here(RunsHere):
        def submit(self, run):
            names.append(run.name)
            file = run.config_path(self.folder)
            if run.detects:
                train_detector(load_detect_config(file))
            else:
                distill(load_distill_config(file))
            future = Future()
            future.set_result((0, ""))
            return future

    monkeypatch.setattr("nst_det.comparison.pipeline.LocalLauncher", Here)
    yield names
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


FIRST = ["teacher", "distill/seed0", "detect/seed0/scratch", "detect/seed0/ce", "detect/seed0/nst-poly"]


def first_steps(cli, words):
    """The commands to the first table."""
    assert cli("check-data", *words.split()[1:]) == 0
    assert cli("init", "my_project", *words.split(), "--device", "cpu") == 0
    shim.shrink("my_project")
    assert cli("compare", "my_project", "--seeds", "0", "--methods", "ce,nst-poly") == 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "labelImg"])
def test_three_commands_to_the_table(layout, sixty, home, started, cli, capsys):
    make, words = LAYOUTS[layout]
    make(sixty, home / "my_images")
    first_steps(cli, words)
    assert sorted(started) == sorted(FIRST)
    printed = capsys.readouterr().out
    assert "nst-poly" in printed
    assert f"report: {home}/my_project/output/report/index.html" in printed
    detect = load_detect_config(home / "my_project" / "detect.yaml")
    assert tuple(detect.DATASETS.CLASSES) == VocDataset(sixty, "trainval").classes
    images = [VocDataset(entry.ROOT, entry.SPLIT).ids for entry in detect.DATASETS.VOC.values()]
    # all 60 are in one of the lists, whoever cut them
    assert sum(map(len, images)) == len(set().union(*images)) == 60


def trained(project):
    """When each run of a project was trained, by its folder."""
    folder = Path(project) / "output"
    return {path.parent.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}


def test_the_whole_way_with_a_project_that_is_moved(sixty, home, started, cli, capsys):
    LAYOUTS["labelImg"][0](sixty, home / "my_images")
    first_steps(cli, "--voc my_images")
    assert sorted(started) == sorted(FIRST)
    begun = trained("my_project")

    # the project alone, then all together
    (home / "deep" / "er").mkdir(parents=True)
    (home / "my_project").rename(home / "deep" / "er" / "moved")
    started.clear()
    assert cli("compare", "deep/er/moved", "--seeds", "0", "--methods", "ce,nst-poly,kd") == 0
    assert sorted(started) == ["detect/seed0/kd", "distill/seed0"]
    now = trained("deep/er/moved")
    assert begun.items() <= now.items()
    assert {path.as_posix() for path in now.keys() - begun.keys()} == {"detect/seed0/kd", "distill/seed0/students/kd"}
    everything = home.rename(home.with_name("elsewhere"))
    os.chdir(everything)
    started.clear()
    answer = nst_det.compare("deep/er/moved", methods=["ce", "nst-poly", "kd"], seeds=[0])
    assert started == []
    assert trained("deep/er/moved") == now
    assert [row.method for row in answer.rows] == ["scratch", "ce", "nst-poly", "kd"]
    # its sample images are found, too
    assert "data:image/jpeg;base64" in answer.report.read_text(encoding="utf-8")

    # from Python, and for others
    run = "deep/er/moved/output/detect/seed0/nst-poly"
    image = next((everything / "my_images").glob("*.jpg"))
    found = nst_det.load_detector(run, threshold=0.0, device="cpu")(image)
    assert len(found.boxes) == len(found.scores) > 0
    written = nst_det.export("detector.pt2", "torch-export", run=run)
    assert written.files
    assert all(path.is_file() for path in written.files.values())
    backbone = "deep/er/moved/output/backbones/my_project-nst-poly-s0.safetensors"
    assert nst_det.export("backbone", "timm", weights=backbone).files["weights"].is_file()

    # other data are other runs
    lists = next((everything / "deep" / "er" / "moved").rglob("nst_det_train.txt"), None)
    xml = next(iter(sorted(lists.parents[2].glob("Annotations/*.xml"))))
    xml.write_text(xml.read_text().replace("<xmin>", "<xmin> ", 1))
    capsys.readouterr()
    assert cli("compare", "deep/er/moved", "--seeds", "0", "--methods", "ce,nst-poly,kd,at") == 2
    assert "FINGERPRINT" in capsys.readouterr().err
