"""``nst-det predict --model``: exported files give what their run gives, in every form of output."""

import json

import numpy as np
import pytest

import nst_det
from nst_det.data.voc import VocDataset
from nst_det.engine.io import read_json, write_json

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """An ONNX file, of a run whose validation split chose a threshold."""
    result = read_json(run_folder / "result.json")
    name = VocDataset(run_folder.parent / "data" / "shapes_voc", "trainval").classes[0]
    thresholds = {name: {"score": 0.16, "f1": 0.5, "curve": [0.5] * 51}}
    write_json(run_folder / "result.json", result | {"thresholds": thresholds})
    file = tmp_path_factory.mktemp("exported") / "detector.onnx"
    nst_det.export(file, "onnx", run=run_folder)
    yield file
    write_json(run_folder / "result.json", result)


@pytest.fixture
def images(run_folder):
    return run_folder.parent / "data" / "shapes_voc" / "JPEGImages"


@pytest.mark.parametrize("options", [["--threshold", "0.15"], [], ["--threshold", "0.15", "--tile", "96"]])
def test_the_file_gives_what_the_run_gives(cli, run_folder, exported, images, tmp_path, capsys, options):
    said = {}
    for name, source in (("run", ["--run", run_folder, "--device", "cpu"]), ("model", ["--model", exported])):
        code = cli("predict", images, *source, "--output", tmp_path / name, "--format", "json,csv,voc,images", *options)
        assert code == 0
        said[name] = capsys.readouterr().out.replace(str(tmp_path / name), "")
    assert said["run"] == said["model"]
    wanted, found = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("run", "model"))
    assert len(found) == len(wanted) > 5
    # scores that are all but equal may change places
    for one in found:
        same = [other for other in wanted if all(one[key] == other[key] for key in ("image_id", "category"))]
        distance, score = min((np.abs(np.subtract(one["bbox"], o["bbox"])).max(), o["score"]) for o in same)
        assert distance < 0.02
        assert one["score"] == pytest.approx(score, abs=1e-4)
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in said]
    assert files[0] == files[1]


def test_from_python(run_folder, exported, images):
    image = next(images.iterdir())
    by_file, by_run = (nst_det.load_detector(one, threshold=0.15, device="cpu") for one in (exported, run_folder))
    assert by_file.classes == by_run.classes
    np.testing.assert_allclose(by_file(image).boxes, by_run(image).boxes, atol=0.02)
    default = nst_det.load_detector(exported)
    assert default.chosen == "validation"
    assert default.thresholds == dict.fromkeys(default.classes, 0.5) | {default.classes[0]: 0.16}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--threshold", "0.05"], "--threshold"),
        (["--device", "cuda"], "--device"),
        (["--model", "other.txt"], "other.txt"),
    ],
)
def test_bad_input_is_one_clear_line(cli, exported, images, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.txt").write_text("nothing")
    assert cli("predict", images, "--model", exported, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line
    assert not (tmp_path / "predictions").exists()
