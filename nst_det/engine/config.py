"""YAML configs with ``_BASE_``, read strictly: every key must be known, and every error names file and key."""

from __future__ import annotations

import ast
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from nst_det.errors import UserError

# keys whose default is a value, and that take none as well
NULLABLE = ("SOLVER.WEIGHT_DECAY_NORM",)

# values of one file; aliases of aliases grow without bound
LARGEST_TREE = 100_000


def load_config(defaults: CfgNode, file: str | Path | None, overrides: Sequence[str] = ()) -> CfgNode:
    """Defaults, then the file (and its ``_BASE_``), then ``KEY VALUE`` pairs; the result is frozen.

    Args:
        defaults: the full tree of known keys with their default values; it is not changed.
        file: a YAML file; None takes the defaults alone.
        overrides: ``["SOLVER.BASE_LR", "0.01", ...]`` as typed on the command line.

    Raises:
        UserError: the file can't be read, a key is unknown, or a value has the wrong type.
    """
    config = defaults.clone()
    config.defrost()
    if file is not None:
        merge_tree(config, read_yaml(file), str(file))
    merge_overrides(config, overrides)
    config.freeze()
    return config


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file with its ``_BASE_`` (a path relative to the file) merged underneath.

    Raises:
        UserError: no such file, not YAML, not a mapping, or bases in a circle.
    """
    return _read_with_base(Path(file), ())


def _read_with_base(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
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
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{file}: _BASE_ must be the path of one YAML file")
    below = _read_with_base(file.parent / Path(base).expanduser(), (*above, file.resolve()))
    return _overlay(below, tree)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def merge_tree(config: CfgNode, tree: dict[str, Any], source: str) -> None:
    """Merge a plain mapping into ``config``; ``source`` is named in errors.

    A node made with ``CfgNode(new_allowed=True)`` takes any key below it.

    Raises:
        UserError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    for path, value in _leaves(tree, config):
        _set(config, path, value, source)


def key_values(words: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of ``KEY VALUE KEY VALUE ...``; a ``--`` before them is passed over.

    Example:
        >>> key_values(["--", "SEED", "1"])
        [('SEED', '1')]

    Raises:
        UserError: a key without a value, or an option in a key's place.
    """
    words = [word for word in words if word != "--"]
    for option in words[::2]:
        if option.startswith("-"):
            raise UserError(f"command line: {option} stands among the KEY VALUE pairs; put it before them")
    if len(words) % 2:
        raise UserError(f"command line: KEY VALUE pairs expected, but '{words[-1]}' has no value")
    return list(zip(words[::2], words[1::2]))


def merge_overrides(config: CfgNode, overrides: Sequence[str]) -> None:
    """Merge ``KEY VALUE`` pairs; values are Python literals where they read as such, text otherwise.

    Raises:
        UserError: an odd number of words, an unknown key, or a value of the wrong type.
    """
    for key, text in key_values(overrides):
        value = parse_value(text)
        if isinstance(value, dict):
            merge_tree(config, _nested(key, value), "command line")
        else:
            _set(config, key.split("."), value, "command line")


def _nested(key: str, value: dict[str, Any]) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def parse_value(text: str) -> Any:
    """A Python literal (``3``, ``(1, 2)``, ``None``), a list or mapping as YAML writes it, or the text itself.

    Example:
        >>> parse_value("[ce, kd+nst-poly:50]"), parse_value("res[3")
        (['ce', 'kd+nst-poly:50'], 'res[3')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    if text.strip()[:1] not in ("[", "{"):
        return text
    try:
        return _from_yaml(text)
    except ValueError:
        return text


def _from_yaml(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
        if _count(value, {}) > LARGEST_TREE:
            raise ValueError(f"more than {LARGEST_TREE} values")
    except (yaml.YAMLError, RecursionError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # PyYAML lets out what a value's own constructor raises: "\UDDDDDDDD", !!int "", !!bool x, !!timestamp x
        raise ValueError(str(error)) from error
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values a tree has, where an alias stands for all of its own."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    elif not known[id(value)]:
        raise ValueError("an alias leads back to itself")
    return known[id(value)]


def _leaves(tree: dict[str, Any], config: CfgNode, path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for key, value in tree.items():
        known = config.get(str(key)) if isinstance(config, CfgNode) else None
        if isinstance(value, dict) and (isinstance(known, CfgNode) or value):
            yield from _leaves(value, known if isinstance(known, CfgNode) else CfgNode(), (*path, str(key)))
        elif not (isinstance(value, dict) and isinstance(known, CfgNode)):
            yield [*path, str(key)], value


def _set(config: CfgNode, path: Sequence[str], value: Any, source: str) -> None:
    node, name = config, ".".join(path)
    for depth, part in enumerate(path[:-1]):
        if part not in node and node.is_new_allowed():
            node[part] = CfgNode(new_allowed=True)
        if not isinstance(node.get(part), CfgNode):
            raise _unknown(config, ".".join(path[: depth + 1]), source)
        node = node[part]
    key = path[-1]
    if key not in node:
        if not node.is_new_allowed():
            raise _unknown(config, name, source)
        node[key] = value
    elif node.is_new_allowed() and not isinstance(node[key], CfgNode):
        # nobody said of which type it is; what stands there is only what was given first
        node[key] = value
    else:
        node[key] = _cast(value, node[key], name, source)


def _unknown(config: CfgNode, name: str, source: str) -> UserError:
    near = difflib.get_close_matches(name, list(flat(config)), n=1)
    remedy = f"did you mean {near[0]}?" if near else "remove it or correct its name"
    return UserError(f"{source}: unknown key {name}; {remedy}")


def _cast(value: Any, default: Any, name: str, source: str) -> Any:
    """``value`` in the type of ``default``; only conversions that lose nothing are made."""
    if default is None or type(value) is type(default) or (value is None and name.endswith(NULLABLE)):
        return value
    if isinstance(default, CfgNode):
        raise UserError(f"{source}: {name} is a group of keys, not a value; set one of {', '.join(default)}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, float) and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4 as text
    if isinstance(default, list | tuple) and isinstance(value, str):
        value = parse_value(value)  # Detectron2's files write (60000, 80000), which YAML reads as text
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return type(default)(value)
    if isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(
        f"{source}: {name} must be of type {type(default).__name__} like {default!r}, "
        f"but is {type(value).__name__} {value!r}"
    )


def flat(config: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All leaves of a config by dotted key, in order.

    Example:
        >>> flat(CfgNode({"A": {"B": 1}, "C": 2}))
        {'A.B': 1, 'C': 2}
    """
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, CfgNode):
            leaves.update(flat(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


def plain(value: Any) -> Any:
    """A config (or any part of one) as plain dicts, lists and scalars, fit for JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def expand_path(text: str, key: str) -> str:
    """``~`` and ``$NAME`` in a path replaced; ``key`` is the config key that is named in the error.

    Raises:
        UserError: an environment variable in the path is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$\{?(\w+)\}?", expanded)
    if missing:
        raise UserError(
            f"{key}: the environment variable {missing[1]} is not set; set it, or give {key} on the command line"
        )
    return expanded


def transfer_node() -> CfgNode:
    """The ``TRANSFER`` keys that both stages share.

    LEVELS are feature levels of the student, or ``student:teacher`` pairs (``res3:res4``).  WEIGHTS, OPTIONS
    and TERM_LEVELS are keyed by term (``{at: 10.0}``, ``{kd: {temperature: 2.0}}``, ``{fitnet: [res4]}``) and
    go before each term's own default; a weight in the method's word (``at:10``) goes before all.

    AUTO_WEIGHT, keyed by term too (``{nst-poly: 0.5}``), goes before WEIGHTS: the weight is the one at which the term's
    gradient in the student's backbone has that share of the task's gradient norm, by the median of the first five
    steps (see :class:`nst_det.losses.loss_balance.GradientBalance`), and stays.
    """
    node = CfgNode()
    node.LEVELS = []
    # assigned one by one: CfgNode({...}) would forget new_allowed
    node.WEIGHTS = CfgNode(new_allowed=True)
    node.TERM_LEVELS = CfgNode(new_allowed=True)
    node.OPTIONS = CfgNode(new_allowed=True)
    node.AUTO_WEIGHT = CfgNode(new_allowed=True)
    node.WARMUP_ITERS = 0
    return node
