import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from nst_det.data import synthetic
from nst_det.data.folders import read_image_folder
from nst_det.data.images import read_image
from nst_det.data.synthetic import (
    CLASSES,
    OUTLINES,
    GenerateSettings,
    annotate,
    draw_scene,
    fill,
    generate_data,
    object_color,
    place,
    settings_from,
)
from nst_det.data.voc import VocDataset
from nst_det.errors import UserError
from tests.helpers.voc import write

SMALL = GenerateSettings(
    classification_images=110, classification_val_images=20, detection_images=24, detection_test_images=6
)
TINY = {
    "classification_images": 10,
    "classification_val_images": 10,
    "detection_images": 2,
    "detection_test_images": 1,
}


def digest(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    return generate_data(tmp_path_factory.mktemp("generated") / "data", SMALL, workers=1)


def test_the_image_folder(generated):
    data = read_image_folder(generated / "shapes_cls")
    assert data.classes == tuple(sorted(CLASSES[:10]))
    assert np.bincount(data.train.labels).tolist() == [11] * 10
    assert np.bincount(data.val.labels).tolist() == [2] * 10
    assert read_image(data.train.path(0)).shape == (64, 64, 3)
    assert all(path.endswith(".jpg") for path in data.train.paths)


def test_the_voc_folder(generated):
    root = generated / "shapes_voc"
    data = VocDataset(root, "trainval")
    test = VocDataset(root, "test", classes=data.classes)
    assert len(data) == 24
    assert len(test) == 6
    assert set(data.classes) <= set(CLASSES[:8])
    assert VocDataset(root, "train").ids + VocDataset(root, "val").ids == data.ids
    assert not set(data.ids) & set(test.ids)
    for part in (data, test):
        for id_ in part.ids:
            image, annotation = part.image(id_), part.annotation(id_)
            assert max(image.shape) == 160
            assert 1 <= len(annotation.objects) <= 6
            part.labels(annotation)
            assert not any(map(annotation.box_fault, range(len(annotation.objects))))
    difficult = np.concatenate([a.difficult for a in data.annotations()])
    assert 0.02 < difficult.mean() < 0.3


def test_any_number_of_processes_gives_the_same_bytes(generated, tmp_path):
    again = generate_data(tmp_path / "again", SMALL, workers=2)
    assert digest(again) == digest(generated)
    assert len(digest(again)) == 110 + 20 + 2 * 30 + 4 + 1


def test_another_seed_gives_other_pictures(generated, tmp_path):
    one = digest(generate_data(tmp_path / "one", settings_from({**TINY, "seed": 1}), workers=1))
    two = digest(generate_data(tmp_path / "two", settings_from({**TINY, "seed": 2}), workers=1))
    assert one.keys() == two.keys()
    same = [name for name in one if one[name] == two[name]]
    assert all(name.startswith("shapes_voc/ImageSets/") for name in same)


def test_a_finished_one_is_kept_and_another_one_refused(tmp_path):
    settings = settings_from(TINY)
    output = generate_data(tmp_path / "data", settings, workers=1)
    marked = write(output / "mine.txt", "kept")
    assert generate_data(output, settings, workers=1) == output
    assert marked.read_text() == "kept"
    with pytest.raises(UserError, match=r"data: .*seed 0, not 5"):
        generate_data(output, settings_from({**TINY, "seed": 5}), workers=1)
    write(tmp_path / "other" / "thesis.txt")
    write(tmp_path / "file")
    for name in ("other", "file"):
        with pytest.raises(UserError, match=f"{name}: "):
            generate_data(tmp_path / name, settings, workers=1)


def test_nothing_appears_under_the_name_before_all_is_there(tmp_path, monkeypatch):
    def fail(*chunk):
        assert not (tmp_path / "data").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "draw_chunk", fail)
    with pytest.raises(UserError, match="data: .*No space left"):
        generate_data(tmp_path / "data", SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    script = (
        "import os, signal, sys; from nst_det.data import synthetic as g\n"
        "g.draw_chunk = lambda *chunk: os.kill(os.getpid(), signal.SIGKILL)\n"
        "g.generate_data(sys.argv[1], workers=1)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "data"], env=environment, check=False)
    assert [path.name.startswith(".data.") for path in tmp_path.iterdir()] == [True]
    generate_data(tmp_path / "data", settings_from(TINY), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("detection_images", 1, "from 2 to"),
        ("classification_classes", 13, "from 2 to 12"),
        ("detection_classes", 11, "from 1 to 10"),
        ("seed", -1, "from 0"),
        ("contrast", 190, "from 0 to 180"),
        ("rotation", float("nan"), "from 0"),
        ("classes", 3, "known"),
        ("seed", "x", "from 0"),
        ("noise", "x", "from 0"),
        ("seed", True, "from 0"),
        ("seed", 1.5, "from 0"),
    ],
)
def test_settings_out_of_range(name, value, limits):
    with pytest.raises(UserError, match=rf"\b{name}\b.*{limits}"):
        settings_from({name: value})


def test_the_command(tmp_path, cli, capsys):
    words = ["generate-data", "--output", tmp_path / "d", "--workers", 1, "--seed", 3, "--noise", 2.5]
    words += [f"--{name.replace('_', '-')}={count}" for name, count in TINY.items()]
    assert cli(*words) == 0
    settings = json.loads((tmp_path / "d" / "settings.json").read_text())
    assert settings["seed"] == 3
    assert settings["noise"] == 2.5
    assert len(VocDataset(tmp_path / "d" / "shapes_voc", "test", classes=CLASSES)) == 1
    assert cli(*words, "--detection-classes", 99) == 2
    assert "detection_classes is 99" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(OUTLINES))
def test_outlines_have_about_the_size_and_area_of_their_numbers(name):
    for seed in range(5):
        placed = place(np.random.default_rng(seed), name, (50.0, 50.0), 20.0, 30.0)
        x0, y0, x1, y1 = placed.bounds
        assert 18 < max(x1 - x0, y1 - y0) < 60
        painted = fill(placed, 100, 100).astype(float).sum() / 255
        edges = sum(np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum() for points in placed.contours)
        # cv2's smoothed edge lies outside the outline and is less than a pixel wide
        assert placed.area < painted < placed.area + edges


def test_colors_and_places_tell_nothing_about_the_class():
    rng = np.random.default_rng(0)
    ground = np.array([100.0, 120.0, 90.0])
    colors = np.stack([object_color(rng, ground, 100) for _ in range(300)])
    assert np.linalg.norm(colors - ground, axis=1).min() >= 100
    # the same draws, another class: only the outline differs
    square = draw_scene(np.random.default_rng(7), "a", ("square",), GenerateSettings())[1]
    star = draw_scene(np.random.default_rng(7), "a", ("star",), GenerateSettings())[1]
    assert (square.width, square.height) == (star.width, star.height)


def test_a_box_holds_exactly_the_visible_pixels():
    placed = place(np.random.default_rng(0), "square", (20.0, 20.0), 10.0, 30.0)
    seen = np.zeros((40, 40), bool)
    seen[5:15, 8:31] = True
    found = annotate(placed, seen)
    assert found.box == (9, 6, 31, 15)
    assert not found.difficult
    seen[8:] = False
    assert annotate(placed, seen).difficult
    assert annotate(replace(placed, small=True), np.ones((40, 40), bool)).difficult
    assert annotate(placed, np.zeros((40, 40), bool)) is None


@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_processes_the_second_takes_the_data_of_the_first(tmp_path, monkeypatch, seed):
    draw, output = synthetic.draw_chunk, tmp_path / "data"

    def overtaken(*chunk):
        monkeypatch.setattr(synthetic, "draw_chunk", draw)
        generate_data(output, settings_from({**TINY, "seed": seed}), workers=1)
        draw(*chunk)

    monkeypatch.setattr(synthetic, "draw_chunk", overtaken)
    if seed == 0:
        assert generate_data(output, settings_from(TINY), workers=1) == output
    else:
        with pytest.raises(UserError, match="holds data made with seed 1, not 0"):
            generate_data(output, settings_from(TINY), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert json.loads((output / "settings.json").read_text())["seed"] == seed
