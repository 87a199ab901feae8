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
from nst_det.detection.predict import load_detector
from nst_det.detection.predictions import Prediction, draw, voc_annotation
from nst_det.detection.sources import Picture, find_sources, read_sources
from nst_det.detection.video import read_frames, video_file
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.evaluation.io import read_detections, write_detections

THRESHOLD = 0.15


@pytest.fixture(scope="module")
def finished(talkative, shapes_config, shapes, tmp_path_factory):
    """A run folder as train-det leaves it, of a detector that was never trained but detects much."""
    data = VocDataset(shapes, "trainval")
    changes = {
        "MODEL.ROI_HEADS.NUM_CLASSES": len(data.classes), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": THRESHOLD,
        "ENGINE": "torchvision",
    }  # fmt: skip
    config, detector = shapes_config(tmp_path_factory.mktemp("finished") / "run", changes), talkative(changes)
    folder = RunFolder(config.OUTPUT_DIR)
    with folder.opened(config):
        save_weights(folder.path / "model.safetensors", detector, data.classes)
        test = VocDataset(shapes, "test", data.classes)
        detector.backbone.to(memory_format=torch.channels_last)
        write_detections(folder.path / "detections.json", detect(detector, evaluation_batches(config, test), test))
        folder.finish({})
    return folder.path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


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
    detector = load_detector(run, threshold=THRESHOLD)
    found = {p.picture.id: p for p in detector.predict(read_sources(find_sources([images])))}
    _, out = command("--format", "voc")
    read = VocDataset(out / "voc", "predicted", detector.classes)
    assert read.ids == tuple(found) == tuple(sorted(path.stem for path in images.iterdir()))
    for id_ in read.ids:
        annotation = read.annotation(id_)
        assert (annotation.height, annotation.width) == found[id_].picture.pixels.shape[:2]
        np.testing.assert_array_equal(annotation.boxes, found[id_].boxes)
        np.testing.assert_array_equal(read.labels(annotation), found[id_].labels)
    assert sum(len(p.boxes) for p in found.values()) > 20


def prediction(box, image):
    picture = Picture("a", Path("dir/<a>.jpg"), image)
    return Prediction(picture, np.array([box], np.float32), np.array([1]), np.array([0.5], np.float32))


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


def film(path, frames=12, size=(64, 48), rate=5):
    """A video whose frames are of one gray each."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 * number % 256, np.uint8))
    writer.release()
    return path


def test_frames_of_a_video(tmp_path):
    pictures = list(read_sources(find_sources([film(tmp_path / "clip.avi")]), every=5))
    assert [(p.id, p.frame, p.rate) for p in pictures] == [(f"clip_{n:06}", n, 1.0) for n in (1, 6, 11)]
    assert [round(float(p.pixels.mean()), -1) for p in pictures] == [0, 100, 200]


def test_a_video_becomes_a_video_between_images(command, images, run, tmp_path):
    """Frames are those of the images, so that there is something to find; the still images keep their own files."""
    still = sorted(images.iterdir())
    frames = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in still]
    height, width = frames[0].shape[:2]
    with video_file(images / "film.mp4", 10.0) as write:
        for frame in frames * 2:
            write(cv2.resize(frame, (width, height)))
    code, out = command("--every", 2, "--format", "images,json,csv,voc", "--device", "cpu")
    assert code == 0
    assert sorted(path.name for path in (out / "images").iterdir()) == sorted(path.name for path in still)
    (video,) = (out / "videos").iterdir()
    drawn = list(read_frames(video))
    assert (video.name, len(drawn), drawn[0][1]) == ("film.mp4", len(still), 5.0)
    # boxes are drawn on it
    read = [frame for _, _, frame in read_frames(images / "film.mp4", 2)]
    assert all(np.abs(a.astype(int) - b[2]).max() > 60 for a, b in zip(read, drawn))
    found = json.loads((out / "detections.json").read_text())
    of_video = [entry for entry in found if "frame" in entry]
    assert {entry["image_id"] for entry in of_video} == {f"film_{entry['frame']:06}" for entry in of_video}
    assert {entry["frame"] for entry in of_video} == set(range(1, 2 * len(still), 2))
    own = json.loads((run / "detections.json").read_text())
    assert [entry for entry in found if "frame" not in entry] == own
    with open(out / "detections.csv", newline="") as file:
        assert [row["frame"] for row in csv.DictReader(file)] == [str(entry.get("frame", "")) for entry in found]
    ids = [*(path.stem for path in still), *(f"film_{number:06}" for number in range(1, 2 * len(still), 2))]
    assert sorted(VocDataset(out / "voc", "predicted", ["arrow"]).ids) == sorted(ids)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_bad_video_is_one_line_and_the_others_are_done(command, tmp_path, capfd, damage):
    good, bad = film(tmp_path / "good.avi"), tmp_path / "bad.avi"
    data = film(bad, frames=60).read_bytes()
    bad.write_bytes({"empty": b"", "text": b"no video", "cut": data[: len(data) // 2]}[damage])
    code, out = command("--format", "images", inputs=tmp_path)
    lines = capfd.readouterr().err.strip().splitlines()
    assert code == 2
    assert [line for line in lines[1:] if str(bad) not in line] == []
    assert len(lines) == 2
    assert (out / "videos" / "good.mp4").is_file()
    assert len(list(read_frames(out / "videos" / "good.mp4"))) == len(list(read_frames(good)))
    # what could be read of a file that was cut off is a whole video too
    left = sorted(path.name for path in (out / "videos").iterdir())
    assert left == (["bad.mp4", "good.mp4"] if damage == "cut" else ["good.mp4"])


def test_an_error_leaves_no_part_of_a_video(tmp_path):
    with pytest.raises(ZeroDivisionError), video_file(tmp_path / "a.mp4", 5.0) as write:  # noqa: PT012
        write(np.zeros((48, 64, 3), np.uint8))
        1 / 0
    assert list(tmp_path.iterdir()) == []


def finish(run, thresholds):
    path = run / "result.json"
    one = {"f1": 0.5, "curve": []}
    path.write_text(json.dumps({"thresholds": {name: {"score": score, **one} for name, score in thresholds.items()}}))


def test_thresholds_of_the_validation_split_are_the_default(run, cli, images, tmp_path, capsys):
    own = json.loads((run / "detections.json").read_text())
    name, other = sorted({entry["category"] for entry in own})[:2]
    scores = sorted(entry["score"] for entry in own if entry["category"] == name)
    middle = scores[len(scores) // 2]

    def kept(*options):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        options = ("--run", run, "--output", out, "--format", "json", "--device", "cpu", *options)
        assert cli("predict", images, *options) == 0
        return json.loads((out / "detections.json").read_text()), capsys.readouterr().out

    # no validation split
    found, printed = kept()
    assert found == [entry for entry in own if entry["score"] >= 0.5]
    assert "validation" in printed
    assert "0.5" in printed
    finish(run, {name: middle})
    found, printed = kept()
    # of other classes nothing was found there
    assert found == [entry for entry in own if entry["score"] >= (middle if entry["category"] == name else 0.5)]
    assert f"{name} {middle:.2g}" in printed
    found, printed = kept("--threshold", THRESHOLD)
    assert found == own
    # one that is above all scores: the best one is told, and what to try finds it
    best = max(entry["score"] for entry in own if entry["category"] == other)
    found, printed = kept("--threshold", 1, "--classes", other)
    assert found == []
    (line,) = (line for line in printed.splitlines() if "try" in line)
    assert f"best score {best:.2g}" in line
    assert kept("--classes", other, *line.split("try ")[1].split())[0]


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
        ("config.yaml", b"MODEL: {}\nENGINE: detectron2", [], "config.yaml"),
        ("config.yaml", b"NAME: x", [], "config.yaml"),
        ("", None, ["--run", "nowhere"], "nowhere"),
        ("", None, ["--threshold", "2"], "--threshold"),
        ("", None, ["--format", "pdf"], "--format"),
        ("", None, ["--classes", "unicorn"], "--classes"),
        ("", None, ["--device", "abacus"], "--device"),
        ("", None, ["--every", "0"], "--every"),
        ("", None, ["--tile", "8"], "--tile"),
        ("", None, ["--tile", "-64"], "--tile"),
        ("", None, ["--tile", "64", "--overlap", "1"], "--overlap"),
        ("", None, ["--tile", "64", "--overlap", "-0.1"], "--overlap"),
        ("", None, ["--overlap", "0.3"], "--tile"),
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
    for name in ("one/a.jpg", "a.png", "notes.txt", "film_000001.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "film.mp4").write_bytes(b"no video")
    for paths, named in ((["nowhere"], "nowhere"), (["empty"], "empty"), (["notes.txt"], "notes.txt"),
                         (["a.png", "one"], "a.jpg.*a.png"), (["film.mp4"], "film.mp4"),
                         (["film_000001.jpg", "film.mp4"], "film_000001.jpg.*frame of .*film.mp4")):  # fmt: skip
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


def test_cudnn_tries_no_kernels_after_a_training_in_this_process(run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    nst_det.load_detector(run, device="cpu")
    assert not torch.backends.cudnn.benchmark


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
