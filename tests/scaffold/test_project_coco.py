import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from nst_det.cli import main
from nst_det.comparison.config import load_comparison
from nst_det.comparison.stages import check_data_folders
from nst_det.data.coco import CocoSource
from nst_det.data.voc import VocDataset
from nst_det.scaffold.init import init_project


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main(["init", *map(str, words)])
    return ended.value.code


def as_coco(voc, split, file, names):
    """A VOC list as COCO JSON, by hand."""
    data = VocDataset(voc, split)
    tree = {"images": [], "annotations": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    for number, annotation in enumerate(data.annotations()):
        name = data.image_path(annotation.id).name
        entry = {"id": number, "file_name": name, "width": annotation.width, "height": annotation.height}
        tree["images"].append(entry)
        for item in annotation.objects:
            xmin, ymin, xmax, ymax = item.box
            box = [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1]
            entry = {"image_id": number, "category_id": names.index(item.name), "bbox": box}
            tree["annotations"].append({**entry, "iscrowd": int(item.difficult)})
    file.write_text(json.dumps(tree))
    return file


def test_a_project_like_the_one_from_voc(thirty, tmp_path, monkeypatch, capsys):
    names = list(VocDataset(thirty, "trainval").classes)
    train = as_coco(thirty, "trainval", tmp_path / "train.json", names)
    test = as_coco(thirty, "test", tmp_path / "test.json", names)
    monkeypatch.chdir(tmp_path)
    assert call("mine", "--coco", train, test, "--images", thirty / "JPEGImages", "--device", "cpu") == 0
    assert "nst-det compare --config-file mine/compare.yaml" in capsys.readouterr().out
    root = tmp_path / "mine" / "data" / "voc"
    for split, theirs in (("train", "trainval"), ("test", "test")):
        mine, wanted = VocDataset(root, split), VocDataset(thirty, theirs)
        assert mine.ids == wanted.ids
        assert mine.classes == wanted.classes
        for one, other in zip(mine.annotations(), wanted.annotations()):
            # COCO has no word for truncated
            assert (one.names, one.width, one.height) == (other.names, other.width, other.height)
            np.testing.assert_array_equal(one.boxes, other.boxes)
            np.testing.assert_array_equal(one.difficult, other.difficult)
    comparison = load_comparison(tmp_path / "mine" / "compare.yaml")
    check_data_folders(comparison.distill, comparison.detect, "here")
    assert Path(comparison.detect.DATASETS.VOC.own_train.ROOT) == root
    # the configs are those that the VOC folder itself gets
    init_project(tmp_path / "other", thirty, device="cpu")
    trees = [yaml.safe_load((tmp_path / name / "detect.yaml").read_text()) for name in ("mine", "other")]
    for tree in trees:
        del tree["DATASETS"]["VOC"], tree["OUTPUT_DIR"]
    assert trees[0] == trees[1]


def test_one_file_is_cut(thirty, tmp_path):
    names = list(VocDataset(thirty, "trainval").classes)
    source = CocoSource((as_coco(thirty, "trainval", tmp_path / "all.json", names),), (thirty / "JPEGImages",))
    project = init_project(tmp_path / "mine", source)
    assert project.cut
    assert sum(project.images) == 24
    assert project.values.voc == project.report.root == tmp_path / "mine" / "data" / "voc"


def test_bad_words_on_the_command_line(tmp_path, capsys):
    folder, out = tmp_path / "pictures", tmp_path / "mine"
    folder.mkdir()
    for name, content in (("a.json", "{}"), ("list.json", "[1, 2]"), ("half.json", '{"images": [')):
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    for words, key in (
        (("--coco", "a.json"), "--images"),
        (("--coco", "a.json", "--images", folder, folder), "--coco: "),
        (("--coco", "a.json", "--images", tmp_path / "none"), "none: no such folder"),
        (("--coco", "none.json", "--images", folder), "none.json: no such file"),
        (("--coco", "list.json", "--images", folder), "list.json: not COCO's object detection format"),
        (("--coco", "half.json", "--images", folder), "half.json: not valid JSON"),
        (("--voc", folder, "--images", folder, folder), "--images: "),
    ):
        assert call(out, *(tmp_path / word if str(word).endswith(".json") else word for word in words)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert key in line
        assert sorted(tmp_path.iterdir()) == before
