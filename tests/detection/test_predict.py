import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from nst_det.cli import main
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
def trained(talkative, on_shapes, shapes):
    """A run folder as train-det leaves it, of a detector that was never trained but says much."""
    data = VocDataset(shapes, "trainval")
    changes = {"MODEL.ROI_HEADS.NUM_CLASSES": len(data.classes), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": THRESHOLD}
    config = on_shapes("run", changes)
    config.defrost()
    config.ENGINE = "torchvision"
    config.freeze()
    detector = talkative(changes)
    folder = RunFolder(config.OUTPUT_DIR)
    with folder.opened(config):
        save_weights(folder.path / "model.safetensors", detector, data.classes)
        test = VocDataset(shapes, "test", data.classes)
        detector.backbone.to(memory_format=torch.channels_last)
        found = detect(detector, evaluation_batches(config, test), test)
        write_detections(folder.path / "detections.json", found)
        folder.finish({})
    return folder.path, test


@pytest.fixture
def images(trained, tmp_path):
    _, test = trained
    folder = tmp_path / "images"
    folder.mkdir()
    for id_ in test.ids:
        shutil.copy(test.image_path(id_), folder)
    return folder


def call(*words):
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, words)])
    return ended.value.code


def test_json_equals_what_the_run_itself_detected(trained, images, tmp_path):
    run, test = trained
    out = tmp_path / "out"
    assert call(images, "--run", run, "--output", out, "--threshold", THRESHOLD, "--device", "cpu") == 0
    own = json.loads((run / "detections.json").read_text())
    assert len(own) > 20
    assert len({entry["category"] for entry in own}) > 1
    assert json.loads((out / "detections.json").read_text()) == own
    found = read_detections(out / "detections.json", test.ids, test.classes, "test")
    assert len(found) == len(own)
    assert sorted(path.stem for path in (out / "images").iterdir()) == sorted(test.ids)


def test_damaged_weights_are_one_line(trained, images, tmp_path, capsys):
    weights = trained[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert call(images, "--run", trained[0], "--output", tmp_path / "out") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nst-det: ")]
    assert len(said) == 1
    assert f"{weights}: damaged (its content is not what was written: SHA-256 differs); get it again" in said[0]


def test_voc_round_trips_exactly(trained, images, tmp_path):
    run, test = trained
    detector, config, classes = load_run(run)
    found = {p.id: p for p in predict(detector, config, read_sources(find_sources([images])))}
    assert call(images, "--run", run, "--output", tmp_path / "out", "--threshold", THRESHOLD, "--format", "voc") == 0
    read = VocDataset(tmp_path / "out" / "voc", "predicted", classes)
    assert read.ids == tuple(found) == tuple(sorted(test.ids))
    for id_ in read.ids:
        annotation = read.annotation(id_)
        assert (annotation.width, annotation.height) == (found[id_].width, found[id_].height)
        np.testing.assert_array_equal(annotation.boxes, found[id_].boxes)
        np.testing.assert_array_equal(read.labels(annotation), found[id_].labels)
    assert sum(len(p.boxes) for p in found.values()) > 20


def test_names_are_escaped_in_xml_and_boxes_are_one_based(tmp_path):
    box = np.array([[0.0, 2.5, 10.0, 20.125]], np.float32)
    one = Prediction(
        "a", "dir/<a>.jpg", 30, 40, box, np.array([0]), np.array([0.5], np.float32), np.zeros((40, 30, 3), np.uint8)
    )
    text = voc_annotation(one, ["cats & <dogs>"])
    assert "<xmin>1.0</xmin>" in text
    assert "<ymin>3.5</ymin>" in text
    assert "<ymax>20.125</ymax>" in text
    (tmp_path / "a.xml").write_text(text)
    from nst_det.data.annotation import read_annotation

    annotation = read_annotation(tmp_path / "a.xml")
    assert annotation.names == ("cats & <dogs>",)
    assert annotation.objects[0].box == (1.0, 3.5, 10.0, 20.125)


def test_csv_threshold_and_classes(trained, images, tmp_path):
    run, _ = trained
    own = json.loads((run / "detections.json").read_text())
    scores = sorted(entry["score"] for entry in own)
    threshold = (scores[len(scores) // 2] + scores[len(scores) // 2 + 1]) / 2
    name = own[0]["category"]
    words = ["--threshold", threshold, "--classes", name, "--format", "csv"]
    assert call(images, "--run", run, "--output", tmp_path / "out", *words) == 0
    with open(tmp_path / "out" / "detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [entry for entry in own if entry["score"] > threshold and entry["category"] == name]
    assert len(rows) == len(wanted) < len(own)
    for row, entry in zip(rows, wanted):
        x, y, width, height = entry["bbox"]
        got = [float(row[key]) for key in ("score", "xmin", "ymin", "xmax", "ymax")]
        assert got == pytest.approx([entry["score"], x, y, x + width, y + height], abs=1e-4)
        assert (row["image_id"], Path(row["file"]).name) == (entry["image_id"], f"{entry['image_id']}.jpg")
    assert not (tmp_path / "out" / "images").exists()


def test_an_unreadable_image_is_named_at_the_end_and_the_others_are_done(trained, images, tmp_path, capsys):
    run, _ = trained
    (images / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    assert call(images, "--run", run, "--output", out, "--threshold", THRESHOLD) == 2
    said = capsys.readouterr()
    assert "1 of 5 files could not be read" in said.err
    assert "broken.jpg: can't be decoded" in said.err
    assert "4 images" in said.out
    assert json.loads((out / "detections.json").read_text()) == json.loads((run / "detections.json").read_text())


def test_a_gpu_that_is_full_is_one_line(trained, images, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")

    monkeypatch.setattr("nst_det.detection.torchvision.Detector.forward", full)
    assert call(images, "--run", trained[0], "--output", tmp_path / "out", "--device", "cpu") == 2
    said = capsys.readouterr()
    assert said.out.startswith("cpu (")
    assert "--device" in said.err.splitlines()[-1]


def test_frames_of_a_video(trained, tmp_path):
    run, _ = trained
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for level in (0, 80, 160, 240, 120):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    frames = list(read_sources(find_sources([path]), every=2))
    assert [id_ for id_, _, _ in frames] == ["clip_000001", "clip_000003", "clip_000005"]
    assert [round(float(pixels.mean()), -1) for _, _, pixels in frames] == [0, 160, 120]
    assert call(path, "--run", run, "--output", tmp_path / "out", "--every", 2, "--format", "images") == 0
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3


def test_drawing_marks_the_box_and_nothing_else():
    image = np.full((120, 160, 3), 7, np.uint8)
    box = np.array([[40.0, 50.0, 100.0, 90.0]], np.float32)
    one = Prediction("a", "a.jpg", 160, 120, box, np.array([1]), np.array([0.9], np.float32), image)
    drawn = draw(one, ["cat", "dog"])
    assert (image == 7).all()
    for row, column in ((50, 99), (89, 60), (70, 40), (70, 99)):
        assert (drawn[row, column] != 7).any()
    for row, column in ((70, 70), (70, 39), (70, 100), (90, 60), (110, 60)):
        assert (drawn[row, column] == 7).all()


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (lambda run: (run / "model.safetensors").unlink(), [], "no model.safetensors in it; finish this run"),
        (lambda run: shutil.rmtree(run), [], "no such folder; name the folder of a finished detector run"),
        (lambda run: (run / "config.yaml").write_text("MODEL: {}\nENGINE: detectron2"), [], "only runs of the torchv"),
        (lambda run: (run / "config.yaml").write_text("NAME: x"), [], "not the config of a detector"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 40), [], "model.safetensors"),
        (None, ["--threshold", "2"], "--threshold: 2.0 is not a score"),
        (None, ["--format", "pdf"], "--format: 'pdf': choose from images, json, voc, csv"),
        (None, ["--classes", "unicorn"], "--classes: this detector doesn't know 'unicorn'; it knows"),
        (None, ["--device", "abacus"], "--device: 'abacus' can't be used here"),
        (None, ["--every", "0"], "--every: 0; give 1 or more"),
    ],
)
def test_bad_input_is_one_clear_line(trained, images, tmp_path, capsys, spoil, words, message):
    run, _ = trained
    if spoil:
        spoil(run)
    assert call(images, "--run", run, "--output", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_bad_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").touch()
    (tmp_path / "a.png").touch()
    (tmp_path / "notes.txt").touch()
    for paths, message in (
        (["nowhere"], "no such file or folder"),
        (["empty"], "no image or video in this folder"),
        (["notes.txt"], "neither an image nor a video"),
        (["a.png", "one"], "has the same name as .*a.png"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources([tmp_path / path for path in paths])
    (tmp_path / "film.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match="film.mp4: can't be read as a video"):
        list(read_sources(find_sources([tmp_path / "film.mp4"])))
