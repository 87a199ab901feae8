"""What the docstrings promise: they are there, they name shapes, units, errors and sources, and examples run."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import nst_det
from nst_det.losses import terms

PACKAGE = Path(nst_det.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# an error of the program, not of its input
OWN_FAULTS = {"AssertionError", "NotImplementedError", "AttributeError", "StopIteration", "SystemExit", "Exception"}
ARRAYS = re.compile(r"\b(Tensor|ndarray)\b")
# (B, C, H, W), (n,), (T, K) or words that leave no shape open
SHAPE = re.compile(
    r"\(((?:\w+|\.\.\.)( [-+*/·] \w+)*)?,( ?[^()]*)\)|\bscalar|\bstate dict|\bmaps?\b.*\blevel", re.IGNORECASE
)
# the shape in the tensor's own name, as maps_BCN
SUFFIX = re.compile(r"\w+_[a-z]?[A-Z]{1,4}")
UNITS = {
    r"(min_|max_)?(size|side|width|height)|stride|box(es)?": r"pixel|height|0\.\.1|stride|bytes|GiB|\d",
    r"seconds|timeout": r"second",
    r"threshold|confidence|fraction|probability|masked|iou": r"\b0\.\.1|0 to 1|between 0 and 1|above 0|overlap|share",
    r"bytes|memory": r"byte|GiB|MiB",
}


def is_public(name):
    return not name.startswith("_")


class Function:
    """A function or method, with what is needed to judge its docstring."""

    def __init__(self, node, owner, module):
        self.node, self.owner, self.module = node, owner, module
        self.name = f"{owner.name}.{node.name}" if owner else node.name
        self.doc = ast.get_docstring(node) or ""
        # a method may lean on what its class says
        self.context = "\n".join([self.doc, ast.get_docstring(owner) or "" if owner else ""])
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.parameters = {item.arg: ast.unparse(item.annotation or ast.Constant("")) for item in every}

    @property
    def returns(self):
        return ast.unparse(self.node.returns) if self.node.returns else ""

    def section(self, title):
        found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)+)", self.doc, re.MULTILINE)
        return found.group(1) if found else ""


class Module:
    """A file of the package, parsed."""

    def __init__(self, path):
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.where = path.relative_to(PACKAGE.parent).as_posix()
        self.functions, self.classes = {}, []
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef):
                self.classes.append(node)
                for item in node.body:
                    self._add(item, node)
            self._add(node, None)

    def _add(self, node, owner):
        if isinstance(node, ast.FunctionDef):
            function = Function(node, owner, self)
            self.functions[function.name] = function

    def public(self):
        return [
            function
            for function in self.functions.values()
            if is_public(function.node.name) and (function.owner is None or is_public(function.owner.name))
        ]

    def raised(self, function, seen=frozenset()):
        """Names of the errors that leave a function, from itself or from private functions of the same file."""
        if function.name in seen:
            return set()
        return self._raised_in(function.node.body, function, seen | {function.name})

    def _raised_in(self, nodes, function, seen):
        found = set()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                continue
            if isinstance(node, ast.Try):
                caught = {name for handler in node.handlers for name in names_in(handler.type)}
                inside = self._raised_in(node.body, function, seen)
                found |= set() if "Exception" in caught else inside - caught
                rest = [*node.handlers, *node.orelse, *node.finalbody]
                found |= self._raised_in(rest, function, seen)
                continue
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found |= self._made_by(node.exc, function)
            elif isinstance(node, ast.Call):
                private = self._private(node, function)
                found |= self.raised(private, seen) if private else set()
            found |= self._raised_in(ast.iter_child_nodes(node), function, seen)
        return found

    def _made_by(self, call, function):
        """What ``raise call`` raises: an error by its class, or by a private function that returns one."""
        private = self._private(call, function)
        if private:
            return {private.returns} if private.returns else set()
        name = names_in(call.func)
        return {name[-1]} if name and name[-1][:1].isupper() else set()

    def _private(self, call, function):
        name = ast.unparse(call.func)
        if function.owner is not None:
            name = re.sub(r"^(self|cls)\.", f"{function.owner.name}.", name)
        found = self.functions.get(name)
        return found if found and not is_public(found.node.name) else None


def names_in(node):
    """``ValueError`` and ``error.X`` as their last parts, also out of a tuple."""
    if node is None:
        return ["Exception"]
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return [ast.unparse(part).rpartition(".")[2] for part in parts]


FILES = [Module(path) for path in MODULES]


def report(faults):
    assert not faults, f"{len(faults)} docstrings to mend:\n" + "\n".join(faults)


def test_everything_public_has_a_docstring():
    faults = []
    for file in FILES:
        if not ast.get_docstring(file.tree):
            faults.append(f"{file.where}: the module has none")
        faults += [f"{file.where}: {item.name}" for item in file.classes if is_public(item.name) and not doc_of(item)]
        faults += [f"{file.where}: {function.name}" for function in file.public() if not function.doc]
    report(faults)


def doc_of(node):
    return ast.get_docstring(node) or ""


def test_tensors_and_arrays_have_shapes():
    faults = []
    for file in FILES:
        for function in file.public():
            named = [function.parameters[name] for name in function.parameters if not SUFFIX.fullmatch(name)]
            typed = [*named, *([] if len(named) < len(function.parameters) else [function.returns])]
            if any(ARRAYS.search(text) for text in typed) and not SHAPE.search(function.context):
                faults.append(f"{file.where}: {function.name}: no shape of its tensors or arrays")
        for node in file.classes:
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and ARRAYS.search(ast.unparse(item.annotation)):
                    lines = re.findall(rf"^ *{ast.unparse(item.target)}:.*(?:\n  +.*)?", doc_of(node), re.MULTILINE)
                    if is_public(node.name) and not SHAPE.search("\n".join(lines) or doc_of(node)):
                        faults.append(f"{file.where}: {node.name}.{ast.unparse(item.target)}: no shape")
    report(faults)


def test_quantities_have_units():
    faults = []
    for file in FILES:
        for function in file.public():
            for name, annotation in function.parameters.items():
                for pattern, unit in UNITS.items():
                    numeric = re.search(r"\b(int|float|Tensor|ndarray)\b", annotation)
                    if numeric and re.fullmatch(pattern, name) and not re.search(unit, function.context):
                        faults.append(f"{file.where}: {function.name}: no unit of {name}")
    report(faults)


def test_errors_are_named():
    faults = []
    for file in FILES:
        for function in file.public():
            # what a command refuses is for nst_det.cli to say
            known = OWN_FAULTS | ({"UserError"} if file.where.startswith("nst_det/commands/") else set())
            named = function.section("Raises")
            missing = {error for error in file.raised(function) - known if not re.search(rf"\b{error}\b", named)}
            if missing:
                faults.append(f"{file.where}: {function.name}: Raises doesn't name {', '.join(sorted(missing))}")
    report(faults)


def test_no_docstring_speaks_of_parameters_that_are_gone():
    faults = []
    for file in FILES:
        for function in file.public():
            items = re.findall(r"^ {4}(\w+):", function.section("Args"), re.MULTILINE)
            variadic = [item.arg for item in (function.node.args.vararg, function.node.args.kwarg) if item]
            stale = set(items) - set(function.parameters) - set(variadic)
            if stale:
                faults.append(f"{file.where}: {function.name}: has no parameter {', '.join(sorted(stale))}")
    report(faults)


def test_every_loss_names_its_source():
    faults = [name for name, term in terms().items() if not term.source]
    for file in FILES:
        if file.where.startswith("nst_det/losses/") and "register_term(" in ast.unparse(file.tree):
            losses = [function for function in file.public() if function.owner is None and "Tensor" in function.returns]
            for function in losses:
                if not re.search(r"arXiv|Source:", function.doc + doc_of(file.tree)):
                    faults.append(f"{file.where}: {function.name}: no source")
    report(faults)


def module_names():
    for path in MODULES:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # the api's examples need a project, see test_api
        if ">>>" in path.read_text(encoding="utf-8") and name != "nst_det.api":
            needs_detectron2 = name.startswith("nst_det.detectron2")
            yield pytest.param(name, marks=pytest.mark.detectron2 if needs_detectron2 else (), id=name)


def test_no_example_is_left_out():
    skipped = [file.where for file, path in zip(FILES, MODULES) if "doctest: +SKIP" in path.read_text(encoding="utf-8")]
    assert skipped == []


@pytest.mark.parametrize("name", list(module_names()))
def test_examples_run(name):
    if name.startswith("nst_det.detectron2"):
        pytest.importorskip("detectron2")
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried > 0
    assert failed == 0
