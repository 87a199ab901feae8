"""``nst-det predict`` on a finished run, and the files that it writes."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import nst_det
from nst_det.data.annotation import read_annotation
from nst_det.data.voc import VocDataset
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.data import evaluation_batches
from nst_det.detection.pipeline import detect
from nst_det.detection.predict import find_sources, load_run, predict, read_sources
from nst_det.detection.predictions import Prediction, draw, voc_annotation
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.evaluation.io import read_detections, write_detections

THRESHOLD = 0.15


@pytest.fixture
def run(talkative, on_shapes, shapes):
    """A run folder as train-det leaves it, of a detector that was never trained but detects much."""
    data = VocDataset(shapes, "trainval")
    changes = {
        "MODEL.ROI_HEADS.NUM_CLASSES": len(data.classes), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": THRESHOLD,
        "ENGINE": "torchvision",
    }  # fmt: skip
    config, detector = on_shapes("run", changes), talkative(changes)
    folder = RunFolder(config.OUTPUT_DIR)
    with folder.opened(config):
        save_weights(folder.path / "model.safetensors", detector, data.classes)
        test = VocDataset(shapes, "test", data.classes)
        detector.backbone.to(memory_format=torch.channels_last)
        write_detections(folder.path / "detections.json", detect(detector, evaluation_batches(config, test), test))
        folder.finish({})
    return folder.path


@pytest.fixture
def images(shapes, tmp_path):
    """A folder with the run's test images."""
    folder, test = tmp_path / "images", VocDataset(shapes, "test")
    folder.mkdir()
    for id_ in test.ids:
        shutil.copy(test.image_path(id_), folder)
    return folder


@pytest.fixture
def command(cli, run, images, tmp_path):
    """``command(*options)``: runs it on the images, and gives its exit code and what is in the output folder."""

    def call(*options, inputs=images):
        out = tmp_path / "out"
        code = cli("predict", inputs, "--run", run, "--output", out, "--threshold", THRESHOLD, *options)
        return code, out

    return call


def test_json_equals_what_the_run_itself_detected(run, command, images, shapes):
    code, out = command("--device", "cpu")
    own = json.loads((run / "detections.json").read_text())
    assert (code, json.loads((out / "detections.json").read_text())) == (0, own)
    assert len(own) > 20
    assert len({entry["category"] for entry in own}) > 1
    test = VocDataset(shapes, "test", VocDataset(shapes, "trainval").classes)
    assert len(read_detections(out / "detections.json", test.ids, test.classes, "test")) == len(own)
    assert sorted(path.stem for path in (out / "images").iterdir()) == sorted(test.ids)


def test_voc_round_trips_exactly(run, command, images):
    detector, config, classes = load_run(run)
    found = {p.id: p for p in predict(detector, config, read_sources(find_sources([images])))}
    _, out = command("--format", "voc")
    read = VocDataset(out / "voc", "predicted", classes)
    assert read.ids == tuple(found) == tuple(sorted(path.stem for path in images.iterdir()))
    for id_ in read.ids:
        annotation = read.annotation(id_)
        assert (annotation.width, annotation.height) == (found[id_].width, found[id_].height)
        np.testing.assert_array_equal(annotation.boxes, found[id_].boxes)
        np.testing.assert_array_equal(read.labels(annotation), found[id_].labels)
    assert sum(len(p.boxes) for p in found.values()) > 20


def prediction(box, image):
    height, width = image.shape[:2]
    scores = np.array([0.5], np.float32)
    return Prediction("a", "dir/<a>.jpg", width, height, np.array([box], np.float32), np.array([1]), scores, image)


def test_names_are_escaped_in_xml_and_boxes_are_one_based(tmp_path):
    one = prediction([0.0, 2.5, 10.0, 20.125], np.zeros((40, 30, 3), np.uint8))
    text = voc_annotation(one, ["x", "cats & <dogs>"])
    for line in ("<xmin>1.0</xmin>", "<ymin>3.5</ymin>", "<ymax>20.125</ymax>"):
        assert line in text
    (tmp_path / "a.xml").write_text(text)
    annotation = read_annotation(tmp_path / "a.xml", "a")
    assert annotation.names == ("cats & <dogs>",)
    assert annotation.objects[0].box == (1.0, 3.5, 10.0, 20.125)


def test_csv_threshold_and_classes(run, command):
    own = json.loads((run / "detections.json").read_text())
    scores = sorted(entry["score"] for entry in own)
    threshold = (scores[len(scores) // 2] + scores[len(scores) // 2 + 1]) / 2
    name = own[0]["category"]
    code, out = command("--threshold", threshold, "--classes", name, "--format", "csv")
    assert code == 0
    with open(out / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [entry for entry in own if entry["score"] > threshold and entry["category"] == name]
    assert len(rows) == len(wanted) < len(own)
    for row, entry in zip(rows, wanted):
        x, y, width, height = entry["bbox"]
        got = [float(row[key]) for key in ("score", "xmin", "ymin", "xmax", "ymax")]
        assert got == pytest.approx([entry["score"], x, y, x + width, y + height], abs=1e-4)
        assert (row["image_id"], Path(row["file"]).name) == (entry["image_id"], f"{entry['image_id']}.jpg")
    assert not (out / "images").exists()


def test_an_unreadable_image_is_named_at_the_end_and_the_others_are_done(run, command, images, capsys):
    (images / "broken.jpg").write_bytes(b"no image")
    code, out = command()
    printed = capsys.readouterr()
    assert code == 2
    assert "1 of 5 files" in printed.err
    assert "broken.jpg" in printed.err
    assert "4 images" in printed.out
    assert json.loads((out / "detections.json").read_text()) == json.loads((run / "detections.json").read_text())


def test_a_gpu_that_is_full_is_one_line(command, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")

    monkeypatch.setattr("nst_det.detection.torchvision.Detector.forward", full)
    assert command("--device", "cpu")[0] == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("cpu (")
    assert "--device" in printed.err.splitlines()[-1]


def test_frames_of_a_video(command, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for level in (0, 80, 160, 240, 120):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    frames = list(read_sources(find_sources([path]), every=2))
    assert [id_ for id_, _, _ in frames] == ["clip_000001", "clip_000003", "clip_000005"]
    assert [round(float(pixels.mean()), -1) for _, _, pixels in frames] == [0, 160, 120]
    code, out = command("--every", 2, "--format", "images", inputs=path)
    assert (code, len(list((out / "images").iterdir()))) == (0, 3)


def test_drawing_marks_the_box_and_nothing_else():
    image = np.full((120, 160, 3), 7, np.uint8)
    drawn = draw(prediction([40.0, 50.0, 100.0, 90.0], image), ["cat", "dog"])
    assert (image == 7).all()
    for row, column in ((50, 99), (89, 60), (70, 40), (70, 99)):
        assert (drawn[row, column] != 7).any()
    for row, column in ((70, 70), (70, 39), (70, 100), (90, 60), (110, 60)):
        assert (drawn[row, column] == 7).all()


@pytest.mark.parametrize(
    ("file", "content", "options", "named"),
    [
        ("model.safetensors", None, [], "model.safetensors"),
        ("model.safetensors", b"x" * 40, [], "model.safetensors"),
        ("config.yaml", None, [], "config.yaml"),
        ("config.yaml", b"MODEL: {}\nENGINE: detectron2", [], "ENGINE is detectron2"),
        ("config.yaml", b"NAME: x", [], "config.yaml"),
        ("", None, ["--run", "nowhere"], "nowhere"),
        ("", None, ["--threshold", "2"], "--threshold"),
        ("", None, ["--format", "pdf"], "--format"),
        ("", None, ["--classes", "unicorn"], "--classes"),
        ("", None, ["--device", "abacus"], "--device"),
        ("", None, ["--every", "0"], "--every"),
    ],
)
def test_bad_input_is_one_clear_line(run, command, capsys, file, content, options, named):
    if content is not None:
        (run / file).write_bytes(content)
    elif file:
        (run / file).unlink()
    code, out = command(*options)
    printed = capsys.readouterr().err.strip()
    assert code == 2
    assert named in printed
    assert "\n" not in printed
    assert not out.exists()


def test_bad_paths(tmp_path):
    for name in ("empty", "one"):
        (tmp_path / name).mkdir()
    for name in ("one/a.jpg", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "film.mp4").write_bytes(b"no video")
    for paths, named in ((["nowhere"], "nowhere"), (["empty"], "empty"), (["notes.txt"], "notes.txt"),
                         (["a.png", "one"], "a.jpg.*a.png"), (["film.mp4"], "film.mp4")):  # fmt: skip
        with pytest.raises(UserError, match=named):
            list(read_sources(find_sources([tmp_path / path for path in paths])))


def turned(path, orientation):
    """The file with the pixels lying on their side and the EXIF tag that sets them upright again, as PNG."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}[orientation]
    file = path.with_name("turned.png")
    Image.open(path).transpose(undo).save(file, exif=exif)
    return file


def test_from_python_any_form_of_an_image_gives_what_predict_gives(run, command, images):
    code, out = command("--device", "cpu", "--format", "json")
    wanted = json.loads((out / "detections.json").read_text())
    assert code == 0
    detector = nst_det.load_detector(run, threshold=THRESHOLD, device="cpu")
    seen = 0
    for path in sorted(images.iterdir()):
        found = detector(path)
        mine = [entry for entry in wanted if entry["image_id"] == path.stem]
        seen += len(mine)
        assert list(found.names) == [entry["category"] for entry in mine]
        assert [detector.classes[label] for label in found.labels] == list(found.names)
        np.testing.assert_allclose(found.scores, [entry["score"] for entry in mine], atol=1e-5)
        # COCO's boxes have a width and a height
        corners = [[x, y, x + width, y + height] for x, y, width, height in (entry["bbox"] for entry in mine)]
        np.testing.assert_allclose(found.boxes, corners, atol=1e-3)
        assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert seen == len(wanted) > 20
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    forms = [str(path), Image.open(path), pixels, Image.fromarray(pixels)]
    for file in (turned(path, 6), turned(path, 3)):
        forms += [file, Image.open(file), Image.open(file).convert("RGBA")]
    for form in forms:
        again = detector(form)
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("nowhere.jpg", "nowhere.jpg"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (Image.new("I;16", (8, 8)), "8 bits"),
        (Image.new("F", (8, 8)), "mode F"),
        (b"bytes", "bytes"),
    ],
)
def test_what_is_no_image_is_named(run, image, named):
    with pytest.raises(UserError, match=named):
        nst_det.load_detector(run, device="cpu")(image)
    with pytest.raises(UserError, match="threshold"):
        nst_det.load_detector(run, threshold=50)
