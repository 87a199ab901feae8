import importlib.metadata
from types import SimpleNamespace

import pytest
from PIL import Image

from nst_det import doctor
from nst_det.doctor import FAULT, OK, WARNING


def test_this_machine_is_fit_for_the_tests():
    findings = {finding.what: finding for finding in doctor.examine()}
    assert [finding for finding in findings.values() if finding.state == FAULT] == []
    for name in ("torch", "torchvision", "timm"):
        assert findings[name].found == importlib.metadata.version(name)


@pytest.mark.parametrize("pin", ["torch==2.4.0", "torch (==2.4.0)", "torch==2.4.0; python_version > '3'"])
def test_a_torchvision_of_another_torch_is_a_fault_with_the_command_that_mends_it(monkeypatch, pin):
    monkeypatch.setattr(doctor, "version", {"torch": "2.14.1+cu130", "torchvision": "0.19.0"}.get)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torchx==1", "numpy", pin])
    finding = doctor.torchvision()
    assert (finding.state, finding.remedy) == (FAULT, "pip install torch==2.4.0 torchvision==0.19.0")
    assert finding.found == "0.19.0 was built for torch 2.4.0, not 2.14.1+cu130"


def test_a_module_that_crashes_is_a_finding_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import os; os.abort()")
    (tmp_path / "failing_module.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.import_error("broken_module") == "exit code -6"
    assert doctor.import_error("failing_module") == "ImportError: undefined symbol: x"
    assert doctor.import_error("sys") is None


def test_missing_packages_are_named(cli, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: None)
    findings = {finding.what: finding for finding in doctor.examine()}
    for name in ("torch", "torchvision", "timm"):
        assert findings[name] == doctor.Finding(name, FAULT, "not installed", f"pip install {name}")
    assert "backbones" not in findings
    assert cli("doctor") == 2


def test_little_memory_and_disk_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(total=1 << 30))
    assert doctor.memory().state == WARNING
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    finding = doctor.disk(tmp_path / "not" / "yet")
    assert (finding.state, finding.found) == (WARNING, f"1.0 GiB free at {tmp_path}")


@pytest.mark.parametrize(("spec", "error", "state"), [(None, None, OK), (1, None, OK), (1, "undefined symbol", FAULT)])
def test_detectron2_missing_working_and_broken(monkeypatch, spec, error, state):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "import_error", lambda module: error)
    finding = doctor.detectron2()
    assert (finding.state, (error or "") in finding.found) == (state, True)
    assert (doctor.DETECTRON2_PAGE in finding.found + finding.remedy) == (spec is None or error is not None)


def test_a_data_set_is_checked_and_its_faults_point_to_the_list(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    assert doctor.data_set(tmp_path).state == OK
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no image")
    finding = doctor.data_set(tmp_path)
    assert (finding.state, finding.remedy) == (WARNING, f"nst-det check-data {tmp_path} lists them")
