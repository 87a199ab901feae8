"""``backbone://NAME``: backbone files found by name, in folders of the user's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

from iopath.common.file_io import PathHandler, PathManager

from nst_det.errors import UserError

PREFIX = "backbone://"
VARIABLE = "NST_DET_BACKBONES"
# of files: a name that ends so is a path
SUFFIXES = (".safetensors", ".pth", ".pt", ".pyth", ".pkl", ".bin", ".ckpt", ".tar", ".th", ".yaml", ".yml", ".json")
# a method with weights is part of a name: kd:0.9+nst-poly
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:=,@-]{0,199}")


def registry_folders() -> list[Path]:
    """The folders of the registry; new files go into the first.

    They are listed in ``$NST_DET_BACKBONES``, separated as in ``$PATH``; without it there is one,
    ``~/.cache/nst_det/models``.
    """
    named = [Path(part).expanduser() for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    return named or [Path("~/.cache/nst_det/models").expanduser()]


def check_name(name: str) -> str:
    """``name`` itself if it can name a backbone.

    Raises:
        UserError: it has other characters than letters, digits and ``._+:=,@-``, or could lead to another folder.
    """
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"'{name[:80]}' can't name a backbone; use letters, digits and ._+:=,@- and start with a letter or digit"
        )
    return name


def resolve(path: str | Path) -> Path:
    """A path as it is, or the file behind a name: the first folder that has ``backbone://NAME`` wins.

    ``hf-hub:ORG/NAME``, ``timm/NAME`` and timm's names of published weights (``resnet18.a1_in1k``), unless there is
    such a file, are those in Hugging Face's cache; see :mod:`nst_det.models.hub`.

    Raises:
        UserError: a name that can't be one, or that no folder has; weights that can't be fetched.
    """
    # Path("backbone://x") has folded the slashes
    scheme = re.match(r"backbone://?", str(path))
    if not scheme:
        found = Path(path).expanduser()
        return found if found.suffix in SUFFIXES or found.exists() else _published(str(path)) or found
    name = check_name(str(path)[scheme.end() :])
    files = [folder / f"{name.removesuffix('.safetensors')}.safetensors" for folder in registry_folders()]
    for file in files:
        if file.is_file():
            return file
    where = ", ".join(str(file.parent) for file in files)
    raise UserError(f"{PREFIX}{name}: not found in {where}; nst-det backbones lists those there are")


def _published(name: str) -> Path | None:
    """Return the file that a name of timm or Hugging Face means; None for a path."""
    if not re.match(r"hf[-_]hub:", name) and (name.count("/") > 1 or not re.match(r"\w[\w.-]*(/|@|$)", name)):
        return None
    # timm takes seconds to import
    from nst_det.models import hub

    found = hub.repository(name)
    if found is None and "/" not in name and "." in name:
        raise UserError(f"{name}: no such file, nor weights of timm's; {hub.near_names(name)}")
    return hub.weights_file(name, *found) if found else None


class BackboneHandler(PathHandler):
    """Resolves ``backbone://NAME`` for iopath, read only."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(resolve(path))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise UserError(f"{path}: backbones are written by save_backbone, not through {PREFIX}")
        return open(resolve(path), mode, buffering=buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        try:
            return resolve(path).exists()
        except UserError:
            return False

    _isfile = _exists

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return False


def register_handler(manager: PathManager) -> None:
    """Teach another iopath manager ``backbone://``, such as Detectron2's."""
    manager.register_handler(BackboneHandler(), allow_override=True)


path_manager = PathManager()
register_handler(path_manager)
