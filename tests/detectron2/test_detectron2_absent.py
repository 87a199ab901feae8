"""What this project does where Detectron2 is not installed, and that nothing imports it unasked."""

import subprocess
import sys

import pytest

from nst_det import detectron2 as engine
from nst_det.cli.training import rebuild_step
from nst_det.errors import UserError
from nst_det.exporting.backbone import export_detectron2

IMPORTS = """
import sys
import nst_det.cli, nst_det.detection.pipeline
import nst_det.detectron2, nst_det.models.convert, nst_det.exporting.backbone
nst_det.cli.build_parser()
loaded = [name for name in sys.modules if name.split(".")[0] == "detectron2"]
assert not loaded, loaded
"""


def test_nothing_imports_it_unasked():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(engine, "is_available", lambda: False)


def test_asking_for_it_gives_the_address_of_its_installation_page(absent):
    with pytest.raises(UserError, match="detectron2.readthedocs.io/en/latest/tutorials/install.html"):
        _ = engine.DistillTrainer
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = engine.nothing


def test_a_step_of_its_own_needs_it(absent):
    with pytest.raises(UserError, match="detectron2.readthedocs.io/en/latest/tutorials/install.html"):
        rebuild_step({"kind": "stage two", "config": {"ENGINE": "detectron2"}})


def test_export_works_without_it_and_says_that_parity_was_not_measured(absent, tmp_path):
    exported = export_detectron2("backbone://r18", tmp_path / "x.pth")
    assert exported.agreement.startswith("not checked")
    assert "DEPTH: 18" in exported.files["config"].read_text()
