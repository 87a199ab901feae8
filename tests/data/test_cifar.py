"""CIFAR and MNIST in the authors' formats, against the same images in a folder."""

import gzip
import hashlib
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from nst_det.data import cifar
from nst_det.data.cifar import read_images
from nst_det.errors import UserError

CLASSES = {10: [f"class{number}" for number in range(10)], 100: [f"fine{number:03}" for number in range(100)]}
FORMATS = ["cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary", "mnist", "mnist.gz"]
# images of a class to train and to test on
COUNTS = (5, 1)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def drawn(classes, side, grey=False):
    """Pixels and labels of the training and of the test images, labels mixed."""
    rng = np.random.default_rng(0)
    parts = []
    for count in COUNTS:
        labels = rng.permutation(np.repeat(np.arange(classes), count))
        pixels = rng.integers(0, 256, (len(labels), side, side, 1 if grey else 3), dtype=np.uint8)
        parts.append((pixels, labels))
    return parts


def write_python(folder, kind, parts, monkeypatch):
    fine, tables = kind is datasets.CIFAR100, []
    for (pixels, labels), names in zip(parts, (kind.train_list, kind.test_list)):
        rows = []
        for (name, _), some, known in zip(names, np.split(pixels, len(names)), np.split(labels, len(names))):
            data = some.transpose(0, 3, 1, 2).reshape(len(some), -1)
            entry = {"data": data, "fine_labels" if fine else "labels": known.tolist()}
            (folder / name).write_bytes(pickle.dumps(entry))
            rows.append([name, md5(folder / name)])
        tables.append(rows)
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: CLASSES[100 if fine else 10]}))
    monkeypatch.setattr(kind, "train_list", tables[0])
    monkeypatch.setattr(kind, "test_list", tables[1])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5(meta)})


def write_binary(folder, binary, parts, monkeypatch):
    for (pixels, labels), names in zip(parts, (binary.train, (binary.test,))):
        for name, some, known in zip(names, np.split(pixels, len(names)), np.split(labels, len(names))):
            coarse = [np.full(len(known), 7)] if binary.label_bytes == 2 else []
            rows = [*coarse, known, *some.transpose(3, 1, 2, 0).reshape(-1, len(some))]
            (folder / name).write_bytes(np.stack(rows, 1).astype(np.uint8).tobytes())
    classes = CLASSES[100 if binary.label_bytes == 2 else 10]
    (folder / binary.names).write_text("\n".join([*classes, ""]))
    sizes = (len(parts[0][1]) // len(binary.train), len(parts[1][1]))
    monkeypatch.setitem(cifar.BINARY, folder.name, binary._replace(images=sizes))


def write_mnist(folder, parts, packed, monkeypatch):
    rows, checksums = [], {}
    for (pixels, labels), (split, prefix, _) in zip(parts, cifar.MNIST_FILES):
        rows.append((split, prefix, len(labels)))
        for name, values in (("images-idx3", pixels[..., 0]), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            content = head + values.astype(np.uint8).tobytes()
            path.write_bytes(gzip.compress(content) if packed else content)
            checksums[path.name.removesuffix(".gz")] = md5(path)
    monkeypatch.setattr(cifar, "MNIST_FILES", tuple(rows))
    monkeypatch.setattr(cifar, "MNIST_MD5", checksums)


def write(root, name, monkeypatch):
    """Write one format below root; return its folder, its class names and its pixels and labels."""
    folder = root / name
    folder.mkdir(parents=True)
    if name.startswith("mnist"):
        parts, classes = drawn(10, 28, grey=True), [str(digit) for digit in range(10)]
        write_mnist(folder, parts, name.endswith("gz"), monkeypatch)
        return folder, classes, [(np.repeat(pixels, 3, 3), labels) for pixels, labels in parts]
    count = 100 if "100" in name else 10
    parts = drawn(count, 32)
    if name in cifar.PYTHON:
        write_python(folder, cifar.PYTHON[name], parts, monkeypatch)
    else:
        write_binary(folder, cifar.BINARY[name], parts, monkeypatch)
    return folder, CLASSES[count], parts


def write_image_folder(root, classes, parts):
    for split, (pixels, labels) in zip(("train", "val"), parts):
        for index, (image, label) in enumerate(zip(pixels, labels)):
            path = root / split / classes[label] / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def assert_same(found, expected):
    assert found.classes == expected.classes
    for split in ("train", "val"):
        one, other = getattr(found, split), getattr(expected, split)
        assert [path.removesuffix(".png") for path in other.paths] == [path.removesuffix(".png") for path in one.paths]
        np.testing.assert_array_equal(one.labels, other.labels)
        for index in range(len(one)):
            np.testing.assert_array_equal(one.image(index), other.image(index))


@pytest.mark.parametrize("name", FORMATS)
def test_the_authors_formats_give_what_the_image_folder_gives(tmp_path, monkeypatch, name):
    folder, classes, parts = write(tmp_path / "published", name, monkeypatch)
    expected = read_images(write_image_folder(tmp_path / "images", classes, parts))
    assert len(expected.train) == 5 * len(classes)
    found = read_images(folder)
    assert_same(found, expected)
    if name in cifar.ARCHIVE_MD5:
        assert read_images(folder.parent).fingerprint() == found.fingerprint()
        archive = pack(folder, tmp_path / "any.tgz")
        monkeypatch.setitem(cifar.ARCHIVE_MD5, name, md5(archive))
        assert_same(read_images(archive), expected)
    cut = read_images(folder, val_fraction=0.4, always_cut=True)
    assert np.bincount(cut.val.labels).tolist() == [2] * len(classes)


@pytest.mark.parametrize("name", FORMATS)
def test_altered_and_truncated_files_are_named(tmp_path, monkeypatch, name):
    folder, *_ = write(tmp_path, name, monkeypatch)
    file = next(
        path for path in sorted(folder.iterdir(), reverse=True) if "t10k-im" in path.name or "test" in path.name
    )
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file.name}: "):
        read_images(folder)
    if name in cifar.ARCHIVE_MD5:
        with pytest.raises(UserError, match=r"any\.tgz: .*MD5"):
            read_images(pack(folder, tmp_path / "any.tgz"))


def test_an_image_folder_may_be_in_an_archive(tmp_path):
    folder = write_image_folder(tmp_path / "images", CLASSES[10], drawn(10, 8))
    archive = pack(folder, tmp_path / "images.tar.gz")
    assert_same(read_images(archive), read_images(folder))
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"images\.tar\.gz: "):
        read_images(archive)


def test_labels_of_some_images(tmp_path):
    train = read_images(write_image_folder(tmp_path, CLASSES[10], drawn(10, 8))).train
    few, rest = train.with_labels(2, False, 0), train.with_labels(2, True, 0)
    assert np.bincount(few.labels).tolist() == [2] * 10
    assert (rest.labels == -1).sum() == 30
    assert rest.paths == train.paths
    assert few.paths == tuple(path for path, label in zip(rest.paths, rest.labels) if label >= 0)
    assert few.paths != train.with_labels(2, False, 1).paths
    # as many more are the same ones and others
    assert set(few.paths) < set(train.with_labels(3, False, 0).paths)
    with pytest.raises(UserError, match="class 'class0' has 5 .*PER_CLASS 6"):
        train.with_labels(6, False, 0)
