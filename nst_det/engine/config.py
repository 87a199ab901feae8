"""YAML configs with ``_BASE_``, read strictly: every key must be known, and every error names file and key."""

import ast
import difflib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from nst_det.errors import UserError

log = logging.getLogger(__name__)
# keys with a default that accept none as well
NULLABLE = ("SOLVER.WEIGHT_DECAY_NORM",)

# values of one file; aliases of aliases grow without bound
LARGEST_TREE = 100_000


def load_config(defaults: CfgNode, file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Return a copy of the defaults with a file and then ``KEY VALUE`` pairs merged into it, frozen."""
    config = defaults.clone()
    config.defrost()
    if file is not None:
        merge_tree(config, read_yaml(file), str(file))
    merge_overrides(config, overrides)
    config.freeze()
    return config


def config_file(path: str | Path, name: str) -> Path:
    """Return the YAML that a user names: a file, or by a project's folder the one of this ``name`` in it."""
    path = Path(path).expanduser()
    if path.is_dir():
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name} in this folder; name a project of nst-det init, or a YAML")
        return path / name
    if not path.exists():
        raise UserError(f"{path}: no such config file; name a project of nst-det init, or a YAML, before KEY VALUE")
    return path


def read_yaml(file: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file, merged over its ``_BASE_``, a path relative to the file.

    A value that begins with ``./`` or ``../`` is a path relative to the file, too, and becomes absolute.  A ROOT may be
    a list of places, of which the first folder that is there is taken.
    """
    file = Path(file)
    if file.resolve() in above:
        raise UserError(f"{file}: _BASE_ leads back to itself; remove one of the _BASE_ lines")
    try:
        tree = _from_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read as text ({error})") from error
    except ValueError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{file}: a config must be a mapping of keys to values")
    base = tree.pop("_BASE_", None)
    tree = placed(tree, file.parent.resolve())
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{file}: _BASE_ must be the path of one YAML file")
    return _overlay(read_yaml(file.parent / Path(base).expanduser(), (*above, file.resolve())), tree)


def placed(value: Any, folder: Path, key: str = "") -> Any:
    """Return values of a file in ``folder`` with their paths made absolute, see :func:`read_yaml`."""
    if isinstance(value, dict):
        return {name: placed(item, folder, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        items = [placed(item, folder) for item in value]
        if key.rpartition(".")[2] == "ROOT" and items:
            there = (item for item in items if os.path.isdir(os.path.expandvars(os.path.expanduser(str(item)))))
            return next(there, items[0])
        return items
    relative = isinstance(value, str) and value.startswith(("./", "../"))
    return os.path.normpath(folder / value) if relative else value


def places(path: str | Path, folder: Path) -> str | list[str]:
    """Return a ROOT for a file in ``folder``: relative, and behind it absolute unless it is inside ``folder``.

    So either may be moved alone, or both together.
    """
    if "$" in str(path):
        return str(path)
    absolute = os.path.abspath(os.path.expanduser(path))
    relative = os.path.relpath(absolute, folder.resolve())
    # with a slash, which tells a path
    return (
        [f"{relative}/" if relative == ".." else relative, absolute] if relative.startswith("..") else f"./{relative}"
    )


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _from_yaml(text: str) -> Any:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # PyYAML lets out what a value's own constructor raises: "\UDDDDDDDD", !!int "", !!bool x, !!timestamp x
        raise ValueError(str(error)) from error
    # an alias counts as all of its values, one that leads back to itself without end
    stack, count = [tree], 0
    while stack:
        value = stack.pop()
        count += 1
        if count > LARGEST_TREE:
            raise ValueError(f"more than {LARGEST_TREE} values")
        if isinstance(value, dict | list):
            stack.extend(value.values() if isinstance(value, dict) else value)
    return tree


def key_values(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of ``KEY VALUE KEY VALUE ...``; a ``--`` before them is dropped."""
    arguments = [argument for argument in arguments if argument != "--"]
    for option in arguments[::2]:
        if option.startswith("-"):
            raise UserError(f"command line: {option} is among the KEY VALUE pairs; put it before them")
    if len(arguments) % 2:
        raise UserError(f"command line: KEY VALUE pairs expected, but '{arguments[-1]}' has no value")
    return list(zip(arguments[::2], arguments[1::2]))


def merge_overrides(config: CfgNode, overrides: Sequence[str]) -> None:
    """Merge ``KEY VALUE`` pairs; another ARCH doesn't get the arguments of the network that was there."""
    for key, text in key_values(overrides):
        _leave_arguments(config, key, text)
    for key, text in key_values(overrides):
        tree = parse_value(text)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        merge_tree(config, tree, "command line")


def _leave_arguments(config: CfgNode, key: str, text: str) -> None:
    *path, last = key.split(".")
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if last != "ARCH" or not isinstance(node, CfgNode) or node.get(last) == text:
        return
    for name in ("ARCH_KWARGS", "KWARGS"):
        if node.get(name):
            where = ".".join([*path, name])
            log.warning("%s %s: %s of %s are left out: %s", key, text, where, node[last], plain(node[name]))
            node[name].clear()


def parse_value(text: str) -> Any:
    """Return a Python literal (``3``, ``(1, 2)``, ``None``), a list or mapping in YAML, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    try:
        return _from_yaml(text) if text.strip().startswith(("[", "{")) else text
    except ValueError:
        return text


def value_text(key: str, value: Any) -> str:
    """Return a setting's value as text that :func:`parse_value` reads as the same."""
    value = str(value) if isinstance(value, Path) else value
    for text in ([value] if isinstance(value, str) else []) + [repr(value)]:
        if parse_value(text) == value:
            return text
    raise UserError(f"settings: {key}: {value!r:.80} can't be written in a config; give numbers, text, lists or dicts")


def merge_tree(config: CfgNode, tree: dict[str, Any], source: str) -> None:
    """Merge a mapping into ``config``; nodes with ``new_allowed`` take any key, and ``source`` is named in errors."""
    _merge(config, tree, "", config, source)


def _merge(node: CfgNode, tree: dict[str, Any], prefix: str, config: CfgNode, source: str) -> None:
    for key, value in tree.items():
        key, free = str(key), node.is_new_allowed()
        name = f"{prefix}{key}"
        if key not in node and not free:
            near = difflib.get_close_matches(name, list(flat(config)), n=1)
            remedy = f"did you mean {near[0]}?" if near else "remove it or correct its name"
            raise UserError(f"{source}: unknown key {name}; {remedy}")
        if free and isinstance(value, dict) and value and not isinstance(node.get(key), CfgNode):
            node[key] = CfgNode(new_allowed=True)
        known = node.get(key)
        if isinstance(known, CfgNode) and isinstance(value, dict):
            _merge(known, value, f"{name}.", config, source)
        elif free and not isinstance(known, CfgNode):
            # no default tells its type
            node[key] = value
        else:
            node[key] = _cast(value, known, name, source)


def _cast(value: Any, default: Any, name: str, source: str) -> Any:
    """Return ``value`` in the type of ``default``; only conversions that lose nothing are made."""
    if type(value) is type(default) or (value is None and name.endswith(NULLABLE)):
        return value
    if default is None and not isinstance(value, dict):
        return value
    if isinstance(default, CfgNode):
        names = f"set one of {', '.join(default)}" if default else "set it to a mapping such as {a: b}"
        raise UserError(f"{source}: {name} is a group of keys, not a value; {names}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, float) and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(default, list | tuple) and not isinstance(value, dict | bool | None):
        return type(default)(_as_list(value))
    if isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(
        f"{source}: {name} must be of type {type(default).__name__} like {default!r}, "
        f"but is {type(value).__name__} {value!r}"
    )


def _as_list(value: Any) -> Sequence[Any]:
    """Return a list as it is, the values between commas in a text, or a single value alone."""
    # Detectron2's files write (60000, 80000), which YAML reads as text
    value = parse_value(value) if isinstance(value, str) else value
    if isinstance(value, str):
        return [parse_value(part.strip()) for part in value.split(",") if part.strip()]
    return value if isinstance(value, list | tuple) else [value]


def flat(config: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Return all leaves of a config by dotted key, in order."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {f"{prefix}{key}": value}
    return leaves


def plain(value: Any) -> Any:
    """Return a config, or any part of one, as plain dicts, lists and scalars, fit for JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def expand_path(text: str, key: str) -> str:
    """Replace ``~`` and ``$NAME`` in the path that config key ``key`` has."""
    expanded = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$\{?(\w+)\}?", expanded)
    if missing:
        raise UserError(
            f"{key}: the environment variable {missing[1]} is not set; set it, or give {key} on the command line"
        )
    return expanded
