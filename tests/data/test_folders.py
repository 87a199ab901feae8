import tarfile

import numpy as np
import pytest

from nst_det.data.cifar import read_images
from nst_det.data.folders import joined, read_image_folder
from nst_det.data.images import read_image
from nst_det.errors import UserError
from tests.helpers.voc import jpeg, write


def fill(root, counts, start=0):
    for place, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write(root / name / f"{start + index:03}.jpg", jpeg(8, 8, seed=1000 * place + index))
    return root


def test_train_and_val_folders(tmp_path):
    fill(tmp_path / "train", {"cat": 3, "ant": 2})
    fill(tmp_path / "val", {"cat": 1, "ant": 1})
    for name in ("train/cat/notes.txt", "train/cat/.hidden.jpg", "classes.txt"):
        write(tmp_path / name, "x")
    data = read_image_folder(tmp_path)
    assert data.classes == ("ant", "cat")
    names = ("ant/000.jpg", "ant/001.jpg", "cat/000.jpg", "cat/001.jpg", "cat/002.jpg")
    assert data.train.paths == tuple(f"train/{name}" for name in names)
    np.testing.assert_array_equal(data.train.labels, [0, 0, 1, 1, 1])
    assert data.val.paths == ("val/ant/000.jpg", "val/cat/000.jpg")
    assert read_image(data.train.path(4)).shape == (8, 8, 3)
    assert data.train.sizes[0] == data.train.path(0).stat().st_size
    data = read_image_folder(tmp_path, classes=["cat", "ant"])
    assert data.classes == ("cat", "ant")
    assert data.train.paths == tuple(f"train/{name}" for name in (*names[2:], *names[:2]))
    assert data.val.labels.tolist() == [0, 1]


@pytest.mark.parametrize("archived", [False, True])
def test_several_folders_are_one_and_classes_of_a_name_are_one_class(tmp_path, archived):
    for part, start in (("train", 0), ("val", 10)):
        fill(tmp_path / "one" / part, {"cat": 2, "ant": 1}, start)
        fill(tmp_path / "two" / part, {"bee": 1, "cat": 1}, start + 20)
    two = tmp_path / "two"
    if archived:
        two = tmp_path / "two.tar"
        with tarfile.open(two, "w") as tar:
            tar.add(tmp_path / "two", "two")
    folders = [read_images(tmp_path / "one"), read_images(two)]
    found = joined(folders)
    assert found.classes == ("ant", "cat", "bee")
    for part, parts in ((found.train, [one.train for one in folders]), (found.val, [one.val for one in folders])):
        assert part.labels.tolist() == [0, 1, 1, 2, 1]
        pixels = [one.image(index) for one in parts for index in range(len(one))]
        assert all(np.array_equal(part.image(index), image) for index, image in enumerate(pixels))
        few = part.select(np.array([4, 1]))
        assert few.labels.tolist() == [1, 1]
        assert np.array_equal(few.image(0), pixels[4])
    # wherever they are
    again = joined([read_images((tmp_path / "one").rename(tmp_path / "three")), read_images(two)])
    assert again.fingerprint() == found.fingerprint() != folders[0].fingerprint()
    assert joined(folders[:1]) is folders[0]


@pytest.mark.parametrize("below", ["", "train"])
def test_a_validation_share_is_cut_by_seed(tmp_path, below):
    fill(tmp_path / below, {"a": 20, "b": 10, "c": 2})
    data = read_image_folder(tmp_path, val_fraction=0.2, seed=1)
    assert np.bincount(data.val.labels).tolist() == [4, 2, 1]
    assert np.bincount(data.train.labels).tolist() == [16, 8, 1]
    assert not set(data.train.paths) & set(data.val.paths)
    assert read_image_folder(tmp_path, val_fraction=0.2, seed=1).val.paths == data.val.paths
    assert read_image_folder(tmp_path, val_fraction=0.2, seed=2).val.paths != data.val.paths
    assert len(read_image_folder(tmp_path, val_fraction=0.0).val) == 0


def test_copies_and_versions_of_an_image_stay_on_one_side_of_the_cut(tmp_path):
    fill(tmp_path, {"a": 20, "b": 20})
    alone = read_image_folder(tmp_path, val_fraction=0.3)
    copies = {}
    for index in range(20):
        for name, data in (
            (f"b/copy{index}.jpg", (tmp_path / f"b/{index:03}.jpg").read_bytes()),
            # the same picture in another class, and a version that has its name alone
            (f"b/of_a{index}.png", (tmp_path / f"a/{index:03}.jpg").read_bytes()),
            (f"a/{index:03}_flip.jpg", jpeg(8, 8, seed=9000 + index)),
        ):
            write(tmp_path / name, data)
            copies[name] = f"{'b' if name.startswith('b/c') else 'a'}/{index:03}.jpg"
    data = read_image_folder(tmp_path, val_fraction=0.3)
    sides = {path: side for side in ("train", "val") for path in getattr(data, side).paths}
    assert len(sides) == 100
    assert all(sides[name] == sides[first] for name, first in copies.items())
    # as without them
    assert set(alone.val.paths) == set(data.val.paths) - set(copies)


def test_a_share_may_be_cut_although_there_is_a_val_folder(tmp_path):
    fill(tmp_path / "train", {"cat": 10, "dog": 10})
    fill(tmp_path / "val", {"cat": 1, "dog": 1})
    assert len(read_image_folder(tmp_path).val) == 2
    data = read_image_folder(tmp_path, val_fraction=0.3, always_cut=True)
    assert (len(data.train), len(data.val)) == (14, 6)
    assert all(path.startswith("train/") for path in (*data.train.paths, *data.val.paths))
    assert data.val.labels.tolist() == [0] * 3 + [1] * 3


@pytest.mark.parametrize(
    ("folder", "given", "key"),
    [
        ("gone", {}, "gone: no such folder"),
        ("empty", {}, "empty: no class folders"),
        ("a", {}, "a/dog: a class without images"),
        ("b", {}, "val/cow"),
        ("a", {"classes": ["../x"]}, r"class '\.\./x'"),
        ("a", {"classes": ["cat"], "val_fraction": 1.5}, r"val_fraction: 1\.5"),
    ],
)
def test_faults_are_named(tmp_path, folder, given, key):
    for name in ("empty", "a/dog"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/cat", "b/train/cat", "b/val/cow"):
        fill(tmp_path, {name: 1})
    with pytest.raises(UserError, match=key):
        read_image_folder(tmp_path / folder, **given)


def test_the_fingerprint_sees_names_labels_and_sizes(tmp_path):
    fill(tmp_path, {"a": 3, "b": 3})
    seen = {read_image_folder(tmp_path).fingerprint()}
    assert read_image_folder(tmp_path).fingerprint() in seen
    seen.add(read_image_folder(tmp_path, classes=["b", "a"]).fingerprint())
    write(tmp_path / "a" / "000.jpg", jpeg(8, 8) + b"!")
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
