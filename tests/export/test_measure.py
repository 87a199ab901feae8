import json
import sys

import numpy as np
import pytest
import torch

from nst_det.detection.predict import load_run
from nst_det.errors import UserError
from nst_det.exporting.detector import DetectorExport
from nst_det.exporting.formats import to_onnx, to_openvino
from nst_det.exporting.graph import DetectorGraph
from nst_det.exporting.measure import in_turns, measure, peak_memory
from nst_det.exporting.runtime import Contract, ExportedDetector, load_exported
from nst_det.report.deployed import COLUMNS, Deployed, add_deployed, lines, read_deployed


@pytest.fixture
def graph_as_file(run_folder, monkeypatch):
    """A file is loaded as PyTorch's own detector with these classes: what measuring does needs no tracing."""
    detector, config, classes = load_run(run_folder)

    def make(given=classes, moved=0.0):
        contract = Contract(given, 2, "int8", config.INPUT.MIN_SIZE_TEST, config.INPUT.MAX_SIZE_TEST, 0.15)

        def run(images):
            with torch.no_grad():
                boxes, *others = (x.numpy() for x in DetectorGraph(detector)(torch.from_numpy(images)))
            return boxes + moved, *others

        monkeypatch.setattr(
            "nst_det.exporting.measure.load_exported", lambda path, threads: ExportedDetector(path, contract, run)
        )

    return make


def test_a_file_that_does_the_same_has_pytorchs_figures(graph_as_file, run_folder, tmp_path, monkeypatch):
    graph_as_file()
    path = tmp_path / "detector.onnx"
    path.write_bytes(b"x" * 1000)
    detector, *others = load_run(run_folder)
    called = []
    detector.register_forward_pre_hook(lambda _, given: called.append(len(given[0])))
    monkeypatch.setattr("nst_det.exporting.measure.load_run", lambda run: (detector, *others))
    in_torch, row = measure([path], run_folder, threads=1, repeats=1)
    # timed on batches, as the file
    assert called[:4] == [2] * 4
    assert (in_torch.name, row.name, in_torch.batch, row.batch) == ("PyTorch fp32", "ONNX int8", 2, 2)
    assert row.map == pytest.approx(in_torch.map, abs=1e-6)
    assert row.per_class.keys() == set(load_run(run_folder)[2])
    assert (row.size, in_torch.size) == (1000, (run_folder / "model.safetensors").stat().st_size)
    # no program beside it
    assert row.memory is None
    assert 0 < row.latency["p10"] <= row.latency["median"] <= row.latency["p90"] <= row.latency["p99"]
    assert (in_torch.ratio, row.threads) == (1.0, 1)


def test_boxes_that_are_elsewhere_cost_accuracy(graph_as_file, run_folder, tmp_path):
    graph_as_file(moved=1e4)
    (tmp_path / "detector.onnx").write_bytes(b"x")
    _, row = measure([tmp_path / "detector.onnx"], run_folder, threads=1, repeats=1)
    assert row.map == 0


def test_files_of_another_run(graph_as_file, run_folder, tmp_path):
    graph_as_file(given=("cat", "dog"))
    with pytest.raises(UserError, match=f"detector.onnx: finds cat, dog; the run {run_folder}"):
        measure([tmp_path / "detector.onnx"], run_folder)


def test_calls_are_in_turns_on_batches_that_move_on():
    seen = []
    images = [np.full((1, 1, 1), value) for value in range(3)]
    calls = [lambda given, name=name: seen.append((name, given.ravel().tolist())) for name in "ab"]
    seconds = in_turns(calls, images, 2, repeats=2)
    assert seconds.shape == (2, 6)
    assert (seconds > 0).all()
    timed = seen[-12:]
    assert [name for name, _ in timed] == list("ab") * 6
    assert [given for name, given in timed if name == "a"] == [[0, 1], [1, 2], [2, 0]] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_the_peak_is_the_programs_own(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nassert sys.argv[1].endswith('.png')\nx = b'1' * 80_000_000\n")
    # this process holds more
    here = b"1" * 300_000_000
    peak = peak_memory([str(program)], np.zeros((3, 4, 5), np.uint8))
    assert 80e6 < peak < len(here)
    program.write_text("raise SystemExit('no runtime')")
    with pytest.raises(UserError, match="program.py: no runtime"):
        peak_memory([str(program)], np.zeros((3, 4, 5), np.uint8))


def row(form="onnx", precision="int8", batch=1, **fields):
    latency = {"p10": 0.009, "median": 0.01, "p90": 0.011, "p99": 0.02}
    values = {"map": 0.8, "per_class": {"a": 0.9, "b": 0.7}, "latency": latency, "ratio": 0.5, "size": 2_000_000}
    return Deployed(
        form, precision, batch, **{**values, "memory": 70_000_000, "threads": 1, "machine": "CPU", **fields}
    )


def test_the_table_of_a_run_is_one_over_all_its_files(tmp_path):
    torch = row("pytorch", "fp32", map=0.81, per_class={"a": 0.9, "b": 0.72}, ratio=1.0, size=8_000_000)
    add_deployed(tmp_path, [row("openvino"), torch])
    rows = add_deployed(tmp_path, [row(), row("openvino", map=0.75)])
    assert [one.name for one in rows] == ["PyTorch fp32", "ONNX int8", "OpenVINO int8"]
    assert read_deployed(tmp_path) == rows
    assert rows[2].map == 0.75
    first, onnx, openvino = (dict(zip(COLUMNS, cells)) for cells in lines(rows))
    assert (onnx["difference"], onnx["most lost"], onnx["size/PyTorch's"]) == ("−0.0100", "b −0.0200", "0.25")
    assert (onnx["time/PyTorch's"], onnx["images/s"], onnx["median ms"], onnx["MB"]) == (
        "0.50",
        "100.0",
        "10.0",
        "2.00",
    )
    assert (first["difference"], openvino["difference"]) == ("–", "−0.0600")
    text = (tmp_path / "deployed.md").read_text().splitlines()
    # as many cells in each line, of which the second is the rule
    assert {line.count("|") for line in text[:5]} == {len(COLUMNS) + 1}
    assert set(text[1]) == set("|-:")


def test_what_is_no_table_of_files(tmp_path):
    (tmp_path / "deployed.json").write_text(json.dumps([{"form": "onnx"}]))
    with pytest.raises(UserError, match="deployed.json"):
        read_deployed(tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--exported", "nowhere.onnx"], "nowhere.onnx"),
        (["--exported", "a.txt"], "a.txt"),
        (["--exported", "a.onnx", "--arch", "resnet18"], "--arch"),
        (["--exported", "a.onnx", "--device", "cuda"], "--device"),
        ([], "--exported"),
    ],
)
def test_a_wrong_call_of_benchmark_ends_in_one_line(cli, words, named, capsys):
    assert cli("benchmark", *words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named in line


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("other.onnx", None, "another project"),
        ("broken.onnx", b"no protobuf", "broken.onnx"),
        ("broken.xml", b"<net>", "broken.xml"),
        ("broken.pt2", b"no archive", "broken.pt2"),
    ],
)
def test_files_that_are_no_detectors(tmp_path, name, content, named):
    path = tmp_path / name
    pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}.get(path.suffix, "torch"))
    if content is None:
        onnx = pytest.importorskip("onnx")
        value = onnx.helper.make_tensor_value_info("x", 1, [1])
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [1])])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=named) as error:
        load_exported(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def of_nobody():
    """ONNX with an operator that there isn't."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], domain="of.nobody")
    graph = onnx.helper.make_graph([node], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [1])])
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("of.nobody", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)


def test_an_operator_that_onnx_runtime_lacks(of_nobody, tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "other.onnx").write_bytes(of_nobody.SerializeToString())
    with pytest.raises(UserError, match="other.onnx: onnx can't load it .*NoSuchOperator") as error:
        load_exported(tmp_path / "other.onnx")
    assert "\n" not in str(error.value)


def test_an_operator_that_openvino_lacks(of_nobody):
    pytest.importorskip("openvino")
    with pytest.raises(UserError, match="--format openvino: .*NoSuchOperator") as error:
        to_openvino(of_nobody)
    assert "\n" not in str(error.value)


def test_an_operator_that_onnx_lacks():
    class Eigenvalues(torch.nn.Module):
        def forward(self, images):
            return torch.linalg.eigvals(images.float()).real

    pytest.importorskip("onnxscript")
    program = torch.export.export(Eigenvalues(), (torch.zeros(1, 3, 2, 2),), strict=False)
    with pytest.raises(UserError, match="--format onnx: .*linalg_eig") as error:
        to_onnx(program)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("output", "options", "named"),
    [
        ("file/d.onnx", {}, "file/d.onnx: can't be written"),
        ("d.onnx", {"precision": "int8", "calibration": ["empty"]}, "empty: no image or video"),
        ("d.onnx", {"images": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_is_refused_before_anything_is_traced(run_folder, tmp_path, monkeypatch, output, options, named):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("nst_det.exporting.formats.trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(UserError, match=named):
        DetectorExport(run_folder).write(output, "onnx", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_batch_of_none(run_folder):
    with pytest.raises(UserError, match="--batch"):
        DetectorExport(run_folder, batch=0)
