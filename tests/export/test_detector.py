import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nst_det.detection.predict import load_run
from nst_det.errors import UserError
from nst_det.exporting.detector import (
    Difference,
    compare_detections,
    equal_scores,
    export_detector,
    partners,
    read_images,
    trace,
)
from nst_det.exporting.graph import DetectorGraph, best_first
from nst_det.exporting.modelcard import detector_card

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def engine(detector, image):
    """What the torchvision engine says, by its own way in: BGR."""
    with torch.no_grad():
        found = detector([{"image": torch.from_numpy(image[::-1].copy())}])[0]
    return [found[name].numpy() for name in ("boxes", "scores", "labels")]


@pytest.fixture(scope="module", autouse=True)
def traced_once(run_folder):
    """Tracing takes longest."""
    traced = trace(load_run(run_folder)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nst_det.exporting.detector.trace", lambda detector: traced)
        yield


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """ONNX of the run."""
    return export_detector(run_folder, tmp_path_factory.mktemp("onnx") / "detector.onnx", "onnx")


@pytest.fixture(scope="module")
def session(exported):
    return onnxruntime.InferenceSession(str(exported.files["detector"]), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("height", "width"), [(128, 160), (128, 131), (97, 160), (40, 33), (200, 310)])
def test_the_graph_finds_what_the_engine_finds_at_any_size(run_folder, session, height, width):
    detector, _, _ = load_run(run_folder)
    image = noise(height, width)
    wanted = engine(detector, image)
    assert 10 < len(wanted[0]) <= 30
    with torch.no_grad():
        graph = [value.numpy() for value in DetectorGraph(detector)(torch.from_numpy(image))]
    onnx_found = session.run(["boxes", "scores", "labels"], {"image": image})
    for found, boxes, scores in ((graph, 1e-4, 1e-6), (onnx_found, 0.01, 1e-4)):
        np.testing.assert_array_equal(found[2], wanted[2])
        np.testing.assert_allclose(found[0], wanted[0], atol=boxes)
        np.testing.assert_allclose(found[1], wanted[1], atol=scores)


def test_nothing_found_is_no_error(run_folder):
    detector, _, _ = load_run(run_folder, threshold=1.0)
    with torch.no_grad():
        boxes, scores, labels = DetectorGraph(detector)(torch.zeros(3, 70, 90, dtype=torch.uint8))
    assert (tuple(boxes.shape), len(scores), len(labels)) == ((0, 4), 0, 0)


def test_the_onnx_file_says_what_it_is(exported, run_folder):
    model = onnx.load(exported.files["detector"])
    (image,) = model.graph.input
    dims = image.type.tensor_type.shape.dim
    assert (dims[0].dim_value, dims[1].dim_param, dims[2].dim_param) == (3, "height", "width")
    assert {"NonMaxSuppression", "RoiAlign"} <= {node.op_type for node in model.graph.node}
    said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert tuple(said["classes"]) == load_run(run_folder)[2]
    assert (said["min_size"], said["max_size"], said["score_threshold"]) == (128, 160, 0.15)
    # no path of the machine that made it
    assert str(run_folder.parent).encode() not in exported.files["detector"].read_bytes()
    assert b"/nst_det/" not in exported.files["detector"].read_bytes()


def test_equal_scores_come_by_index_and_are_counted(run_folder):
    best, index = best_first(torch.tensor([1.0, 3, 2, 3, 3, -torch.inf]), 4)
    assert (best.tolist(), index.tolist()) == ([3, 3, 3, 2], [1, 3, 4, 2])
    detector, _, _ = load_run(run_folder)
    assert equal_scores(detector, noise(128, 160)) == 0
    # a dead hidden layer: every anchor of a kind has its bias for a score
    torch.nn.init.zeros_(detector.proposal_generator.rpn_head.conv.weight)
    torch.nn.init.constant_(detector.proposal_generator.rpn_head.conv.bias, -1.0)
    cells = 8 * 10 + 4 * 5
    assert equal_scores(detector, noise(128, 160)) >= min(100, cells) - 6


def test_the_card_is_the_runs_own_result(exported, run_folder, tmp_path):
    # the difference was measured on the test images
    said = re.fullmatch(
        r"4 images, (\d+) detections: boxes within (\S+) px .*, scores within (\S+) .*", exported.agreement
    )
    detections, boxes, scores = map(float, said.groups())
    assert (detections > 40, boxes <= 0.01, scores <= 1e-4) == (True, True, True)
    text = exported.files["card"].read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["pipeline_tag"] == "object-detection"
    assert metadata["library_name"] == "onnx"
    (results,) = metadata["model-index"][0]["results"]
    assert [metric["value"] for metric in results["metrics"]] == [0.25, 0.2]
    assert results["dataset"]["name"] == "own_test (shapes_voc, test)"
    rows = ("steps | 7 of 2 images", "seed | 3", "mAP, IoU 0.5 (11-point) | 0.2500")
    assert [row for row in rows if f"| {row} |" not in body] == []
    assert "COCO" not in body
    assert exported.agreement in body
    assert str(run_folder.parent) not in text
    # without figures it says so
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "result.json").unlink()
    bare = detector_card(run, *load_run(run)[1:], "d.onnx", "onnx", exported.agreement)
    assert "model-index" not in bare
    assert "Not measured." in bare


def test_the_code_on_the_card_runs(exported, monkeypatch, capsys):
    (code,) = exported.files["card"].read_text().split("```python\n")[1:]
    monkeypatch.chdir(exported.files["detector"].parent)
    Image.fromarray(noise(256, 300).transpose(1, 2, 0)).save("image.jpg")
    exec(code.split("```")[0], {})
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_torch_export_by_the_command_line(cli, run_folder, tmp_path, capsys):
    output = tmp_path / "detector.pt2"
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(2):
        Image.fromarray(noise(140, 200, seed).transpose(1, 2, 0)).save(images / f"{seed}.png")
    assert cli("export", "--format", "torch-export", "--run", run_folder, "--output", output, "--images", images) == 0
    assert "compared  2 images" in capsys.readouterr().out
    program = torch.export.load(str(output)).module()
    detector, _, _ = load_run(run_folder)
    image = noise(100, 150)
    for found, wanted in zip(program(torch.from_numpy(image)), engine(detector, image)):
        np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-4)


def test_on_real_images(session, run_folder, real_data):
    detector, config, classes = load_run(run_folder)
    files = sorted((real_data / "bccd" / "JPEGImages").glob("*.jpg"))[:4]
    result = compare_detections(
        lambda image: engine(detector, image),
        lambda image: session.run(["boxes", "scores", "labels"], {"image": image}),
        read_images(config, classes, files),
        0.15,
        most=30,
    )
    assert (result.images, result.alone) == (4, 0)
    assert result.detections > 40


def test_what_differs_is_not_written(run_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.export.save", lambda program, file, extra_files: file.write(b"program"))
    nothing = found()
    monkeypatch.setattr("nst_det.exporting.detector._load_program", lambda path: lambda image: nothing)
    with pytest.raises(UserError, match="d.pt2"):
        export_detector(run_folder, tmp_path / "d.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--format", "onnx", "--weights", "x", "--output", "a.onnx"], "--run"),
        (["--format", "timm", "--run", "x", "--output", "a"], "--weights"),
        (["--format", "onnx", "--run", "nowhere", "--output", "a.pt"], ".onnx"),
        (["--format", "onnx", "--run", "nowhere", "--output", "a.onnx"], "nowhere"),
        (["--format", "timm", "--weights", "x", "--output", "a", "--images", "b"], "--images"),
        (["--format", "timm", "--weights", "x", "--output", "a", "--arch", "b"], "--arch"),
    ],
)
def test_a_wrong_call_ends_in_one_line(cli, words, named, capsys):
    assert cli("export", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


def found(*rows):
    boxes = np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, 4)
    return boxes, np.array([row[1] for row in rows], dtype=np.float32), np.array([row[2] for row in rows])


def test_partners_agree_in_label_box_and_score():
    box = [0.0, 0.0, 10.0, 10.0]
    near, far = [0.0, 0.0, 10.0, 10.009], [0.0, 0.0, 10.0, 10.02]
    assert partners(found((box, 0.5, 1)), found((near, 0.50009, 1))) == ([(0, 0)], [])
    for other in ((far, 0.5, 1), (box, 0.5002, 1), (box, 0.5, 2)):
        pairs, alone = partners(found((box, 0.5, 1)), found(other))
        assert not pairs
        assert alone == pytest.approx([0.5, other[1]])
    # each serves once
    assert partners(found((box, 0.5, 1), (box, 0.5, 1)), found((box, 0.5, 1)))[1] == [0.5]
    assert partners(found(), found()) == ([], [])


@pytest.mark.parametrize(
    ("mine", "theirs", "most", "alone", "borderline"),
    [
        ([(0.9, 0), (0.30005, 1)], [(0.9, 0)], 2, 0, 1),  # on the edge of the score threshold
        ([(0.9, 0), (0.4, 1)], [(0.9, 0)], 2, 1, 0),  # lost
        ([(0.9, 0), (0.4, 1)], [(0.9, 0), (0.4, 2)], 2, 0, 2),  # cut by the number of detections
        ([(0.9, 0), (0.4, 1)], [(0.9, 0), (0.4, 2)], 3, 2, 0),  # with room for more nothing is cut
    ],
)
def test_a_detection_on_an_edge_is_excused_and_no_other(mine, theirs, most, alone, borderline):
    mine, theirs = (found(*(([0, 0, 10, 10], *row) for row in rows)) for rows in (mine, theirs))
    result = compare_detections(lambda _: mine, lambda _: theirs, [noise(4, 4)], 0.3, most=most)
    assert (result.alone, result.borderline) == (alone, borderline)


def test_differences_are_the_largest_of_all():
    result = compare_detections(
        lambda _: found(([0, 0, 10, 10], 0.5, 0), ([5, 5, 9, 9], 0.4, 1)),
        lambda _: found(([0, 0, 10, 10.004], 0.5, 0), ([5, 5, 9, 9], 0.40005, 1)),
        [noise(4, 4), noise(4, 4)],
    )
    assert (result.images, result.detections, result.alone) == (2, 4, 0)
    assert (result.boxes, result.scores) == pytest.approx((0.004, 5e-5), rel=1e-2)
    result.check("x")
    with pytest.raises(UserError, match="x: on 1 images 3 detections"):
        Difference(images=1, detections=5, alone=3).check("x")


def test_missing_libraries_are_named(run_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="onnxscript"):
        export_detector(run_folder, tmp_path / "d.onnx", "onnx")
