"""A malicious pickle, a script as a name: none runs, each is named."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch

from nst_det.cli import build_parser
from nst_det.engine.checkpoint import load_checkpoint
from nst_det.errors import UserError
from nst_det.models import load_plain
from nst_det.models.io import trusting_pickles
from nst_det.report import write_report
from tests.helpers.finished import CLASSES, build_results, typed
from tests.helpers.page import Page

SCRIPT = "<script>document.title='PWNED'</script>"
ATTRIBUTE = '"><img src=x onerror=alert(1)>'


class Evil:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "PWNED").exists()


def evil_files(folder):
    torch.save({"model": {"w": torch.ones(1)}, "x": Evil()}, folder / "zip.pth")
    torch.save({"x": Evil()}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "plain.pth").write_bytes(pickle.dumps(Evil(), 2))
    (folder / "zoo.pkl").write_bytes(pickle.dumps({"model": {"w": Evil()}, "__author__": "x"}))
    return sorted(folder.iterdir())


def test_a_malicious_pickle_is_not_opened_and_the_reason_given(tmp_path):
    files = evil_files(tmp_path)
    assert len(files) == 4
    for path in files:
        with pytest.raises(UserError, match=f"^{path}: not opened: it is a pickle.*--trust-pickle"):
            load_plain(path)
        with pytest.raises(UserError, match=f"{path.name}: damaged"):
            load_checkpoint(path)


def test_an_honest_pickle_is_opened_only_where_the_user_trusts_it(tmp_path):
    path = tmp_path / "zoo.pkl"
    weights = {"a.weight": np.arange(3, dtype=np.float32)}
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    with trusting_pickles():
        assert torch.equal(load_plain(path)["a.weight"], torch.arange(3.0))
    with trusting_pickles(False), pytest.raises(UserError, match=r"zoo\.pkl: not opened"):
        load_plain(path)


@pytest.mark.parametrize("command", ["train-det", "distill", "compare", "convert", "replay"])
def test_the_flag_is_there_and_off(command):
    words = {"convert": ["--weights", "w", "--to", "timm", "--output", "o"], "replay": ["f"]}
    given = [command, *words.get(command, ["--config-file", "c"])]
    assert build_parser().parse_args(given).trust_pickle is False
    first, *rest = given
    assert build_parser().parse_args([first, "--trust-pickle", *rest]).trust_pickle is True


def test_a_script_as_a_name_is_text_in_the_report(tmp_path):
    calm, results = build_results(), build_results(classes=(SCRIPT, ATTRIBUTE, *CLASSES[2:]))
    results["name"] = SCRIPT
    results["settings"] |= {"DATA": SCRIPT, ATTRIBUTE: "x"}
    results["provenance"] |= {"command": SCRIPT, "platform": ATTRIBUTE}
    for name, tree in (("evil", results), ("calm", calm)):
        write_report(typed(tree), tmp_path / name, tmp_path)
    evil, good = ((tmp_path / name / "index.html").read_text() for name in ("evil", "calm"))
    # the page has its own scripts, and no other; no handler, no image from elsewhere
    scripts = re.compile("<script[^>]*>(.*?)</script>", re.DOTALL)
    assert scripts.findall(evil) == scripts.findall(good)
    Page(evil).check_self_contained()
    assert SCRIPT not in evil
    assert ATTRIBUTE not in evil
    # and it is named
    assert "&lt;script&gt;document.title=" in evil


def test_a_script_as_a_class_in_the_data_is_a_name_like_any_other(tree, cli, capsys):
    path = tree / "voc" / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<name>cup<", "<name>&lt;script&gt;x&lt;/script&gt;<"))
    entry = {"image_id": "a", "category": "<script>x</script>", "bbox": [1, 1, 5, 5], "score": 0.5}
    file = tree / "detections.json"
    file.write_text(json.dumps([entry]))
    assert cli("evaluate", "--voc-root", tree / "voc", "--split", "train", "--detections", file) == 0
    assert "<script>" in capsys.readouterr().out
