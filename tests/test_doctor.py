import importlib.metadata
from types import SimpleNamespace

import pytest

from nst_det import doctor
from nst_det.doctor import FAULT, OK, WARNING, examine, wanted_torch


def found(findings, what):
    (finding,) = [finding for finding in findings if finding.what == what]
    return finding


def test_this_machine_is_fit_for_the_tests():
    findings = examine()
    assert [finding for finding in findings if finding.state == FAULT] == []
    assert found(findings, "torch").found == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("requirements", "version"),
    [
        (["numpy", "torch (==2.4.0)"], "2.4.0"),
        (["torch==2.14.1; python_version > '3'"], "2.14.1"),
        (["torchx==1"], None),
    ],
)
def test_wanted_torch(requirements, version):
    assert wanted_torch(requirements) == version


def test_a_torchvision_of_another_torch_is_a_fault_with_the_command_that_mends_it(monkeypatch):
    versions = {"torch": "2.14.1+cu130", "torchvision": "0.19.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["torch==2.4.0"])
    finding = doctor._torchvision()
    assert finding.state == FAULT
    assert finding.found == "0.19.0 was built for torch 2.4.0, not 2.14.1+cu130"
    assert finding.remedy == "pip install torch==2.4.0 torchvision==0.19.0"


def test_a_module_that_crashes_is_a_finding_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import os; os.abort()")
    (tmp_path / "failing_module.py").write_text("raise ImportError('undefined symbol: x')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor._import_error("broken_module") == "exit code -6"
    assert doctor._import_error("failing_module") == "ImportError: undefined symbol: x"
    assert doctor._import_error("sys") is None


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    for look in (doctor._torch, doctor._torchvision, doctor._timm):
        finding = look()
        assert (finding.state, finding.found) == (FAULT, "not installed")
        assert finding.remedy.startswith("pip install ")


def test_little_memory_and_disk_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: 1 << 15)
    assert doctor._memory().state == WARNING
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    finding = doctor._disk(tmp_path / "not" / "yet")
    assert (finding.state, finding.found) == (WARNING, f"1.0 GiB free at {tmp_path}")


@pytest.mark.parametrize(
    ("spec", "error", "state", "said"),
    [
        (None, None, OK, "ENGINE torchvision does without"),
        (object(), None, OK, "fits torch"),
        (object(), "undefined symbol: x", FAULT, "can't be imported: undefined symbol: x"),
    ],
)
def test_detectron2_missing_working_and_broken(monkeypatch, spec, error, state, said):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "_import_error", lambda module: error)
    finding = doctor._detectron2()
    assert finding.state == state
    assert said in finding.found
    assert (doctor.DETECTRON2_PAGE in finding.found + finding.remedy) == (spec is None or error is not None)


def test_a_data_set_is_checked_and_its_faults_point_to_the_list(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    assert found(doctor.examine([tmp_path]), f"data {tmp_path}").state == OK
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no image")
    finding = doctor._data_set(tmp_path)
    assert (finding.state, finding.remedy) == (WARNING, f"nst-det check-data {tmp_path} lists them")
