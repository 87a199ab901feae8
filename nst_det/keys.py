"""All keys of all configs, with their defaults and meanings: ``nst-det keys``, and docs/keys.md."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nst_det.comparison.config as comparison
import nst_det.detection.config as detection
import nst_det.distillation.config as distillation
import nst_det.tune.config as tune
from nst_det.comparison.stages import DETECT, DISTILL
from nst_det.detection.d2_defaults import HONORED
from nst_det.engine.keys import Key
from nst_det.errors import UserError


@dataclass(frozen=True)
class Group:
    """The keys of one kind of config."""

    file: str  # its name in a project
    title: str
    keys: Mapping[str, Key]
    prefix: str = ""  # before its keys in a comparison


GROUPS = (
    Group("compare.yaml", "Keys of a comparison", comparison.KEYS),
    Group("distill.yaml", "Keys of stage one", distillation.KEYS, f"{DISTILL}."),
    Group("detect.yaml", "Keys of stage two", dict(sorted((HONORED | detection.ADDED).items())), f"{DETECT}."),
    Group("tune.yaml", "Keys of a search", tune.KEYS),
)
HEAD = """# All keys

Of the four configs of a project, with their defaults. Written by `nst-det keys --output docs/keys.md`.

`KEY VALUE` pairs behind a command set them (`nst-det compare my_project SEEDS 0,1`); a comparison hands `DISTILL.X` and
`DETECT.X` on to its stages. Lists are written with commas, or as in YAML: `[res3, res4]`. In a YAML, a path that begins
with `./` or `../` is relative to that file, and a `ROOT` may be a list of places, of which the first folder that is
there is taken.
"""


def find_keys(prefix: str = "") -> list[tuple[Group, dict[str, Key]]]:
    """Return the keys of each config that begin with ``prefix``, or have it at a dot (``MAX_ITER``); "" takes all."""
    wanted = prefix.upper()
    found = []
    for group in GROUPS:
        own = {key: value for key, value in group.keys.items() if f".{group.prefix}{key}".find(f".{wanted}") >= 0}
        found += [(group, own)] if own else []
    if not found:
        every = [group.prefix + key for group in GROUPS for key in group.keys]
        parts = {part for key in every for part in (key, key.partition(".")[2], key.rpartition(".")[2])}
        near = difflib.get_close_matches(wanted, sorted(parts), n=1)
        raise UserError(
            f"no key begins with {prefix}; {f'did you mean {near[0]}?' if near else 'nst-det keys lists all'}"
        )
    return found


def default_text(value: Any) -> str:
    """Return a default as a YAML has it."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return {"true": "True", "false": "False", "null": "None"}.get(text, text)


def meaning_text(key: Key) -> str:
    """Return a key's meaning, and the values that it takes."""
    return f"{key.meaning} ({key.wanted})" if key.wanted and key.wanted not in key.meaning else key.meaning


def page() -> str:
    """Return docs/keys.md."""
    parts = [HEAD]
    for group in GROUPS:
        parts.append(f"\n## {group.title}\n\n`{group.file}`\n\n| key | default | meaning |\n|---|---|---|\n")
        for name, key in group.keys.items():
            parts.append(
                f"| `{name}` | `{default_text(key.default)}` | {meaning_text(key).replace('|', chr(92) + '|')} |\n"
            )
    unknown = ", ".join(f"`{name}`" for name in detection.DETECTRON2_ONLY)
    parts.append(f"\nWith `ENGINE detectron2` the other keys of Detectron2 may be set as well: {unknown}.\n")
    return "".join(parts)
