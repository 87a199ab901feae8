import cv2
import numpy as np
import pytest

from nst_det.cli import main
from nst_det.data.folders import read_image_folder
from nst_det.data.images import read_image
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from nst_det.scaffold.crops import background_windows, object_crops, write_crops


@pytest.fixture
def make(tmp_path):
    """A VOC folder from id -> [(class, box on disk)], images black but for a pixel, 100 x 80."""

    def build(objects, pixels=None):
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (tmp_path / "voc" / name).mkdir(parents=True, exist_ok=True)
        for number, (id_, items) in enumerate(objects.items()):
            inner = ""
            for name, box in items:
                frame = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
                inner += f"<object><name>{name}</name><bndbox>{frame}</bndbox></object>"
            text = f"<annotation><size><width>100</width><height>80</height></size>{inner}</annotation>"
            (tmp_path / "voc" / "Annotations" / f"{id_}.xml").write_text(text)
            image = np.zeros((80, 100, 3), np.uint8) if pixels is None else pixels.copy()
            image[0, 0] = number
            cv2.imwrite(str(tmp_path / "voc" / "JPEGImages" / f"{id_}.png"), image)
        (tmp_path / "voc" / "ImageSets" / "Main" / "train.txt").write_text("\n".join(objects))
        return VocDataset(tmp_path / "voc", "train")

    return build


def test_windows_by_hand(make):
    data = make({"a": [("cat", (31, 21, 50, 60)), ("dog", (1, 1, 10, 10)), ("cat", (70, 70, 74, 90))]})
    windows = list(object_crops(data, "a"))
    # 20 x 40 around (40, 40): 48 x 48; 10 x 10 in the corner: reaches to 11, cut off at 0; 5 pixels wide: left out
    assert windows == [((16, 16, 64, 64), "cat"), ((0, 0, 11, 11), "dog")]


def test_background_misses_the_objects(make):
    data = make({"a": [("cat", (31, 21, 50, 60)), ("dog", (61, 1, 80, 20))]})
    windows = background_windows(data, "a", 6)
    assert len(windows) >= 3
    covered = np.zeros((80, 100), bool)
    covered[20:60, 30:50] = covered[0:20, 60:80] = True
    for left, top, right, bottom in windows:
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        assert right - left == bottom - top
        assert covered[top:bottom, left:right].mean() <= 0.1
    assert background_windows(data, "a", 6) == windows


def test_an_image_folder_is_written_and_no_image_is_in_both_parts(make, tmp_path):
    pixels = np.zeros((80, 100, 3), np.uint8)
    pixels[16:64, 16:64] = (0, 0, 250)  # BGR: red where the cat's window is
    data = make({f"{n}": [("cat", (31, 21, 50, 60))] for n in range(10)}, pixels)
    counts = write_crops(data, tmp_path / "crops")
    assert counts["cat"] == 10
    found = read_image_folder(tmp_path / "crops")
    assert found.classes == ("background", "cat")
    parts = [{path.split("/")[-1].split("_")[0] for path in part.paths} for part in (found.train, found.val)]
    assert not parts[0] & parts[1]
    assert len(parts[1]) == 2
    assert len(found.train) + len(found.val) == counts.total()
    cats = [path for path in found.train.paths if "/cat/" in path]
    crop = read_image(found.root / cats[0])
    assert crop.shape == (48, 48, 3)
    assert crop[:, :, 0].mean() > 240
    assert crop[:, :, 2].mean() < 10


@pytest.mark.parametrize("roomy", range(4))
def test_what_one_image_alone_has_room_for_is_in_training(make, tmp_path, roomy):
    full = [("cat", (1, 1, 100, 80)), ("dog", (1, 1, 100, 80))]
    objects = {str(number): [("cat", (31, 21, 50, 60))] if number == roomy else full for number in range(4)}
    write_crops(make(objects), tmp_path / "crops")
    assert "background" in read_image_folder(tmp_path / "crops").classes


def test_the_command_cuts_a_list_once(make, tmp_path, capsys):
    data = make({f"{n}": [("cat", (31, 21, 50, 60))] for n in range(4)})
    words = ["crop-objects", "--voc", str(data.root), "--split", "train", "--output", str(tmp_path / "made")]
    for code in (0, 2):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code
    write_crops(data, tmp_path / "same")
    made, same = (read_image_folder(tmp_path / name) for name in ("made", "same"))
    assert made.fingerprint() == same.fingerprint()
    assert str(tmp_path / "made") in capsys.readouterr().err


def test_what_cannot_be_cut(make, tmp_path):
    with pytest.raises(UserError, match="too few images in train"):
        write_crops(make({"a": [("cat", (31, 21, 50, 60))]}), tmp_path / "crops")
    with pytest.raises(UserError, match="objects of one class.*--images"):
        write_crops(make({n: [("cat", (1, 1, 100, 80))] for n in "cd"}), tmp_path / "crops")
    with pytest.raises(UserError, match="class 'a/b' could lead to another folder"):
        write_crops(make({n: [("a/b", (31, 21, 50, 60))] for n in "cd"}), tmp_path / "crops")
