"""What the public docstrings promise: parameters, shapes, sources and errors are named, and examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import nst_det
import nst_det.detection.distiller
import nst_det.losses
import nst_det.models
from nst_det.errors import UserError
from nst_det.losses import terms

PACKAGE = Path(nst_det.__file__).parent
ARRAYS = re.compile(r"\b(Tensor|ndarray)\b")
# (B, C, H, W), (n,), (T, K), or words that leave no shape open
SHAPE = re.compile(
    r"\(((?:\w+|\.\.\.)( [-+*/·] \w+)*)?,( ?[^()]*)\)|\bscalar|\bstate dict|\bmaps?\b.*\blevel", re.IGNORECASE
)

# what a loss compares, and what keeps the teacher's part of it for other students
OF_EVERY_LOSS = {"student", "teacher", "shared"}


def exported():
    """What a user imports: the package's own names, and those of the packages that are built upon."""
    for package in (nst_det, nst_det.losses, nst_det.models):
        for name in package.__all__:
            yield f"{package.__name__}.{name}", getattr(package, name)
    for name in ("DistilledDetector", "distill"):
        yield f"nst_det.detection.distiller.{name}", getattr(nst_det.detection.distiller, name)


PUBLIC = {name: item for name, item in exported() if inspect.isclass(item) or inspect.isfunction(item)}
FUNCTIONS = [name for name, item in PUBLIC.items() if inspect.isfunction(item)]


def parameters(name):
    return [item for item in inspect.signature(PUBLIC[name]).parameters.values() if item.name != "self"]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_a_docstring_that_names_its_parameters(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    assert doc, "no docstring"
    listed = re.findall(r"^ {4}\*{0,2}(\w+)[:,]", re.split(r"^\w+:$", doc.split("Args:\n")[-1], flags=re.M)[0], re.M)
    names = {item.name for item in parameters(name)}
    if "Args:" in doc:
        assert set(listed) <= names, f"no parameter {set(listed) - names}"
    if "Args:" in doc or inspect.isfunction(PUBLIC[name]):
        left = names - OF_EVERY_LOSS - set(re.findall(r"\w+", doc))
        assert not left, f"{left} not explained"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_and_arrays_have_shapes(name):
    signature = inspect.signature(PUBLIC[name])
    typed = [*(str(item.annotation) for item in signature.parameters.values()), str(signature.return_annotation)]
    if any(map(ARRAYS.search, typed)):
        assert SHAPE.search(inspect.getdoc(PUBLIC[name]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_users_errors_are_named(name):
    if f"raise {UserError.__name__}(" in inspect.getsource(PUBLIC[name]):
        assert UserError.__name__ in inspect.getdoc(PUBLIC[name]).partition("Raises:")[2]


def test_every_loss_names_its_source():
    assert [name for name, term in terms().items() if not (term.source and term.summary)] == []
    losses = [name for name in FUNCTIONS if name.endswith("_loss")]
    assert len(losses) >= 7
    for name in losses:
        text = inspect.getdoc(PUBLIC[name]) + (inspect.getmodule(PUBLIC[name]).__doc__ or "")
        assert re.search(r"arXiv|Source:", text), f"{name}: no source"


def modules_with_examples():
    for module in pkgutil.walk_packages([str(PACKAGE)], "nst_det."):
        path = PACKAGE.parent / Path(*module.name.split("."))
        path = path / "__init__.py" if module.ispkg else path.with_suffix(".py")
        # the api's examples need a project, see test_api
        if ">>>" in path.read_text(encoding="utf-8") and module.name != "nst_det.api":
            marks = pytest.mark.detectron2 if module.name.startswith("nst_det.detectron2") else ()
            yield pytest.param(module.name, marks=marks, id=module.name)


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_run(name):
    if name.startswith("nst_det.detectron2"):
        pytest.importorskip("detectron2")
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0
