"""A method from outside the package, in the three steps that docs/methods.md shows."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nst_det.losses import ModelOutputs, build_transfer, parse_method, register_term, terms, unregister_term
from nst_det.losses.ops import aligned, unit


# 1. the loss, a function on tensors
def cosines(maps):
    x = unit(maps.flatten(1))
    return x @ x.T


def similarity_loss(student, teacher, shared):
    small, large = aligned(student, teacher, shared)
    target = shared(("similarity", large.shape[2:]), lambda: cosines(large))
    return (cosines(small) - target).square().mean()


# 2. the module that a pair of levels gets, and its entry in the registry
class Similarity(nn.Module):
    def __init__(self, pair, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher, shared):
        return self.scale * similarity_loss(student, teacher, shared)


ENTRY = {
    "name": "cosine",
    "level": "maps",
    "weight": 3000.0,
    "source": "ours",
    "summary": "which samples of the batch have maps in one direction",
}


@pytest.fixture
def _registered():
    register_term(**ENTRY)(Similarity)
    yield
    unregister_term("cosine")


@pytest.mark.parametrize(("level", "student_kind"), [("logits", "maps"), ("maps", "embedding")])
def test_maps_are_compared_with_maps_alone(level, student_kind):
    with pytest.raises(ValueError, match="'cosine' reads .*maps"):
        register_term(**{**ENTRY, "level": level}, student_kind=student_kind)


@pytest.mark.usefixtures("_registered")
def test_a_method_from_outside_is_a_method_like_any_other():
    # 3. its name, wherever a method is named
    assert parse_method("cosine:10+kd").word == "kd+cosine:10"
    loss = build_transfer(
        "cosine+nst-poly",
        levels=["res3"],
        student_channels={"res3": 3},
        teacher_channels={"res3": 5},
        options={"cosine": {"scale": 0.5}},
    )
    student = ModelOutputs(maps={"res3": torch.randn(4, 3, 6, 6, requires_grad=True)})
    teacher = ModelOutputs(maps={"res3": torch.randn(4, 5, 6, 6)})
    values = loss(student, teacher)
    x, y = (maps.detach().flatten(1) for maps in (student.maps["res3"], teacher.maps["res3"]))
    x, y = nn.functional.normalize(x), nn.functional.normalize(y)
    difference = x @ x.T - y @ y.T
    torch.testing.assert_close(values["cosine"].detach(), 3000 * 0.5 * difference.square().mean())
    values["cosine"].backward()
    assert student.maps["res3"].grad.abs().max() > 0


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "registered already"),
        ({"name": "ce"}, "can't name a term"),
        ({"name": "Kd"}, "can't name a term"),
        ({"name": "a+b"}, "can't name a term"),
        ({"name": "pkt", "level": "map"}, "logits, maps, embedding"),
        ({"name": "pkt", "weight": float("nan")}, "finite"),
    ],
)
def test_a_term_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        register_term(**{**ENTRY, **changes})(Similarity)
    assert list(terms()).count("cosine") == 1
    assert "pkt" not in terms()


def test_what_was_unregistered_is_unknown():
    for look_up in (parse_method, unregister_term):
        with pytest.raises(ValueError, match="unknown term 'cosine'"):
            look_up("cosine")


def test_a_module_named_in_the_environment_adds_its_terms_to_every_command(tmp_path):
    (tmp_path / "my_terms.py").write_text(
        "from torch import nn\n"
        "from nst_det.losses import register_term\n"
        "@register_term('cosine', 'maps', 3000.0, 'ours', 'similar samples')\n"
        "class Similarity(nn.Identity):\n"
        "    pass\n"
    )
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    for module, code, named in (
        ("my_terms", 0, "similar samples"),
        ("no_such_terms", 2, "$NST_DET_TERMS: can't import 'no_such"),
    ):
        environment = {**os.environ, "NST_DET_TERMS": module, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}
        command = [sys.executable, "-m", "nst_det", "methods", "kd+cosine"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert named in done.stdout + done.stderr
