import numpy as np
import pytest

from nst_det.data.folders import read_image_folder
from nst_det.data.images import read_image
from nst_det.errors import UserError


def fill(voc, root, counts, start=0):
    for name, count in counts.items():
        for index in range(count):
            voc.write(root / name / f"{start + index:03}.jpg", voc.jpeg(8, 8, seed=index))
    return root


def test_train_and_val_folders(voc, tmp_path):
    fill(voc, tmp_path / "train", {"cat": 3, "ant": 2})
    fill(voc, tmp_path / "val", {"cat": 1, "ant": 1})
    voc.write(tmp_path / "train" / "cat" / "notes.txt", "x")
    voc.write(tmp_path / "train" / "cat" / ".hidden.jpg", "x")
    voc.write(tmp_path / "classes.txt", "x")
    data = read_image_folder(tmp_path)
    assert data.classes == ("ant", "cat")
    assert data.train.paths == (
        "train/ant/000.jpg", "train/ant/001.jpg", "train/cat/000.jpg", "train/cat/001.jpg", "train/cat/002.jpg",
    )  # fmt: skip
    np.testing.assert_array_equal(data.train.labels, [0, 0, 1, 1, 1])
    assert data.val.paths == ("val/ant/000.jpg", "val/cat/000.jpg")
    assert read_image(data.train.path(4)).shape == (8, 8, 3)
    assert data.train.sizes[0] == data.train.path(0).stat().st_size


@pytest.mark.parametrize("below", ["", "train"])
def test_a_validation_share_is_cut_by_seed(voc, tmp_path, below):
    fill(voc, tmp_path / below, {"a": 20, "b": 10, "c": 2})
    data = read_image_folder(tmp_path, val_fraction=0.2, seed=1)
    assert np.bincount(data.val.labels).tolist() == [4, 2, 1]
    assert np.bincount(data.train.labels).tolist() == [16, 8, 1]
    assert not set(data.train.paths) & set(data.val.paths)
    again = read_image_folder(tmp_path, val_fraction=0.2, seed=1)
    assert again.val.paths == data.val.paths
    assert read_image_folder(tmp_path, val_fraction=0.2, seed=2).val.paths != data.val.paths
    assert len(read_image_folder(tmp_path, val_fraction=0.0).val) == 0


def test_an_image_added_later_moves_hardly_any_other(voc, tmp_path):
    fill(voc, tmp_path, {"a": 40})
    before = set(read_image_folder(tmp_path, val_fraction=0.25).val.paths)
    fill(voc, tmp_path, {"a": 1}, start=900)
    after = set(read_image_folder(tmp_path, val_fraction=0.25).val.paths)
    assert len(before - after) <= 1


def test_given_classes_are_taken_in_their_order(voc, tmp_path):
    fill(voc, tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    fill(voc, tmp_path / "val", {"a": 1, "b": 1, "c": 1})
    data = read_image_folder(tmp_path, classes=["c", "a"])
    assert data.classes == ("c", "a")
    assert data.train.paths == ("train/c/000.jpg", "train/a/000.jpg")
    assert data.val.labels.tolist() == [0, 1]


def test_faults_are_named(voc, tmp_path):
    with pytest.raises(UserError, match="gone: no such folder; name one that holds train/CLASS"):
        read_image_folder(tmp_path / "gone")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: no class folders"):
        read_image_folder(tmp_path / "none")
    fill(voc, tmp_path / "a", {"cat": 1})
    (tmp_path / "a" / "dog").mkdir()
    with pytest.raises(UserError, match=r"a/dog: a class without images \(\.jpg.*; add some or remove it"):
        read_image_folder(tmp_path / "a")
    fill(voc, tmp_path / "b" / "train", {"cat": 1})
    fill(voc, tmp_path / "b" / "val", {"cow": 1})
    with pytest.raises(UserError, match=r"val/cow: a class that .*train doesn't have"):
        read_image_folder(tmp_path / "b")
    with pytest.raises(UserError, match=r"class '\.\./x' could lead to another folder"):
        read_image_folder(tmp_path / "a", classes=["../x"])
    with pytest.raises(UserError, match=r"val_fraction: 1\.5 is not in \[0, 1\)"):
        read_image_folder(tmp_path / "a", classes=["cat"], val_fraction=1.5)


def test_the_fingerprint_sees_names_labels_and_sizes(voc, tmp_path):
    fill(voc, tmp_path, {"a": 3, "b": 3})
    seen = {read_image_folder(tmp_path).fingerprint()}
    assert read_image_folder(tmp_path).fingerprint() in seen
    seen.add(read_image_folder(tmp_path, classes=["b", "a"]).fingerprint())
    voc.write(tmp_path / "a" / "000.jpg", voc.jpeg(8, 8) + b"!")
    seen.add(read_image_folder(tmp_path).fingerprint())
    (tmp_path / "a" / "000.jpg").rename(tmp_path / "a" / "777.jpg")
    seen.add(read_image_folder(tmp_path).fingerprint())
    assert len(seen) == 4


@pytest.mark.real_data
def test_real_folders(real_data):
    data = read_image_folder(real_data / "tiny_imagenet_50")
    assert len(data.classes) == 50
    assert np.bincount(data.train.labels).tolist() == [120] * 50
    assert np.bincount(data.val.labels).tolist() == [30] * 50
