"""The package's own functions: they are what the commands are, they import nothing early, and their results show."""

import doctest
import importlib.util
import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nst_det
from nst_det import api
from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data
from nst_det.engine.signals import Preempted
from nst_det.errors import UserError
from tests.helpers.small_comparison import RunsHere, write_comparison

GUIDE = Path(__file__).parent / "guide" / "shim.py"


def test_import_is_light_and_the_functions_stay_functions():
    code = (
        "import sys, nst_det; print(*(name in sys.modules for name in ('torch', 'numpy', 'rich')));"
        "assert set(nst_det.__all__) <= set(dir(nst_det)); first = nst_det.compare, nst_det.distill;"
        "import nst_det.comparison.plan, nst_det.distillation.pipeline;"
        "assert (nst_det.compare, nst_det.distill) == first; help(nst_det.compare)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False False False\n")
    assert "ray_address:" in done.stdout
    with pytest.raises(AttributeError, match="comparee"):
        nst_det.comparee


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["SEEDS", "[0]"], ["SEEDS", "[0]"]),
        ({"A.B": None, "C": True, "D": 1e-5}, ["A.B", "None", "C", "True", "D", "1e-05"]),
        ({"NAME": "12", "PATH": Path("a b/c")}, ["NAME", "'12'", "PATH", "a b/c"]),
        ({"W": {"kd": 1.0}, "L": ["res3:res4"]}, ["W", "{'kd': 1.0}", "L", "['res3:res4']"]),
    ],
)
def test_settings_become_key_value_pairs(settings, expected):
    assert api.key_values(settings) == expected
    with pytest.raises(UserError, match="settings: X"):
        api.key_values({"X": [0.0, object()]})


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: nst_det.export("x", "timm"), "--format timm .*--weights"),
        (lambda: nst_det.export("x", "onnx", run="run", weights="file"), "--format onnx .*--run"),
        (lambda: nst_det.init("x", "nowhere", device="cuda:0"), "--device: 'cuda:0'"),
    ],
)
def test_bad_input_is_one_line(call, named):
    with pytest.raises(UserError, match=named):
        call()


def test_a_stopped_comparison_leaves_the_signals_as_they_were(tmp_path, monkeypatch):
    class Stopping(RunsHere):
        def submit(self, run):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("nst_det.comparison.pipeline.LocalLauncher", Stopping)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Preempted, match="SIGTERM"):
        nst_det.compare(write_comparison(tmp_path), output=tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def html(result):
    """What a notebook shows."""
    return result._repr_mimebundle_((), ())["text/html"]


def test_the_examples_run_and_the_results_show(cli, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("guide_shim", GUIDE)
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    settings = GenerateSettings(
        classification_images=3, classification_val_images=3, classification_classes=3,
        detection_images=9, detection_test_images=3, detection_classes=3,
    )  # fmt: skip
    voc = generate_data(tmp_path / "data", settings, workers=1) / DETECTION
    for name in ("Annotations", "JPEGImages"):
        shutil.copytree(voc / name, tmp_path / "my_images" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli("init", "my_project", "--voc", "my_images") == 0
    shim.shrink("my_project")
    failed, tried = doctest.testmod(api, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (failed, tried > 10) == (0, True), capsys.readouterr().out

    result = nst_det.compare("my_project/compare.yaml", {"METHODS": ["ce"], "SEEDS": [0]})
    written = json.loads((result.folder / "report" / "results.json").read_text())
    assert [row.map for row in result.rows] == [row["map"] for row in written["rows"]]
    ce = next(row for row in result.rows if row.method == "ce")
    assert f"{ce.map:.3f}" in html(result)

    # the command prints the same figures
    detections = "my_project/output/detect/seed0/ce/detections.json"
    scores = nst_det.evaluate_voc(detections, "my_images", "nst_det_test")
    assert scores.map11[0] == pytest.approx(ce.map, abs=1e-12)
    assert f"{scores.map11[0]:.4f}" in html(scores)
    cli("evaluate", "--detections", detections, "--voc-root", "my_images", "--split", "nst_det_test")
    assert f"{scores.map11[0]:.4f}" in capsys.readouterr().out

    students = nst_det.distill("my_project/distill.yaml", {"METHODS": ["kd+nst-poly"]})
    assert f"{100 * students['kd+nst-poly']['top1']:.1f} %" in html(students)
    assert students.folder == str(tmp_path / "my_project" / "output" / "distill")


def test_logging_that_is_configured_stays(monkeypatch):
    logger = logging.getLogger()
    mine = logging.NullHandler()
    monkeypatch.setattr(logger, "handlers", [mine])
    with pytest.raises(UserError):
        nst_det.compare("nowhere.yaml")
    assert logger.handlers == [mine]
