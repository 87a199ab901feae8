"""Published weights by timm's and Hugging Face's names: those in the hub's cache, or fetched into it."""

from __future__ import annotations

import difflib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub import constants
from huggingface_hub.utils import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nst_det.errors import UserError

PREFIXES = ("hf-hub:", "hf_hub:")
WEIGHTS, CONFIG = ("model.safetensors", "pytorch_model.bin"), "config.json"
# until the hub has to answer, name servers included
SECONDS = 5.0
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\][^/\\]+$")


def near_names(name: str) -> str:
    """Return how an error goes on: with timm's published names nearest to one, of the same network if it has a tag."""
    base, _, tag = name.removeprefix("timm/").partition(".")
    own = timm.list_pretrained(f"{base}.*") if tag else []
    near = difflib.get_close_matches(name.removeprefix("timm/"), own or timm.list_pretrained(), n=4, cutoff=0.3)
    return f"near it: {', '.join(near)}" if near else "timm.list_pretrained() lists them"


def repository(name: str) -> tuple[str, str] | None:
    """Return repository and revision of ``hf-hub:ORG/NAME@REVISION``, ``timm/NAME`` or a timm name; None for others."""
    named, _, revision = name.partition("@")
    for prefix in PREFIXES:
        if named == prefix:
            raise UserError(f"{name}: names no repository; write hf-hub:ORG/NAME")
        if named.startswith(prefix):
            return named.removeprefix(prefix), revision or "main"
    own = named.removeprefix("timm/")
    if "/" in own or not (named != own or timm.is_model(own.split(".")[0])):
        return None
    if not timm.is_model_pretrained(own):
        raise UserError(f"{name}: timm has no published weights of this name; {near_names(own)}")
    if (published := timm.get_pretrained_cfg(own)) is None or not published.hf_hub_id:
        raise UserError(f"{name}: timm's weights of it are not on Hugging Face; name a file of weights")
    return published.hf_hub_id, revision or "main"


def weights_file(name: str, repo: str, revision: str = "main") -> Path:
    """Return the weights in a repository of the hub: out of its cache, or fetched into it.

    Safetensors are taken where there are some.  A repository that timm doesn't know has its input in ``config.json``,
    which is fetched too.

    Raises:
        UserError: ``name`` isn't there, or is not in the cache and can't be fetched; in one line.
    """
    try:
        if _known(repo) is None:
            _file(repo, CONFIG, revision)
        for file in WEIGHTS:
            if found := _cached(repo, file, revision):
                return found
        for file in WEIGHTS:
            if found := _file(repo, file, revision):
                return found
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        near = near_names(repo.rpartition("/")[2])
        raise UserError(f"{name}: Hugging Face has no {repo} at {revision} that you may read; {near}") from error
    except Exception as error:  # the network's errors are of many libraries
        raise UserError(f"{name}: {missing(repo, revision)} ({str(error) or type(error).__name__})") from error
    raise UserError(f"{name}: {repo} has no {' or '.join(WEIGHTS)}; name a file of weights")


def missing(repo: str, revision: str = "main") -> str:
    """Return which files of a repository to bring by hand, and where to put them."""
    files = [file for file in ([CONFIG] if _known(repo) is None else []) if not _cached(repo, file, revision)]
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    ref = folder / "refs" / revision
    snapshot = folder / "snapshots" / (ref.read_text() if ref.is_file() else revision)
    return (
        f"not in Hugging Face's cache, and the hub can't be reached; download {' and '.join([*files, WEIGHTS[0]])} "
        f"from {constants.ENDPOINT}/{repo} into {snapshot}"
    )


def to_bring(arch: str) -> str:
    """Return the line about timm's published weights of ``arch`` that are neither here nor can be fetched; or ""."""
    found = repository(arch)
    assert found is not None
    if any(_cached(found[0], file, found[1]) for file in WEIGHTS):
        return ""
    try:
        _ask(*found, WEIGHTS[0])
    except EntryNotFoundError:
        return ""
    except Exception as error:  # the network's errors are of many libraries
        return f"weights of {arch}: {missing(*found)} ({str(error) or type(error).__name__})"
    return ""


def described(path: str | Path) -> tuple[str, Mapping[str, Any] | None]:
    """Return the repository of a file in the hub's cache and what is said there of its input; "" for other files."""
    found = CACHED.search(str(path))
    if not found:
        return "", None
    repo = f"{found[1]}/{found[2]}"
    if known := _known(repo):
        return repo, known
    try:
        said = json.loads((Path(path).parent / CONFIG).read_text(encoding="utf-8"))
        said = said.get("pretrained_cfg", said)
        sizes: Sequence[int] = said["input_size"]
        if all(len(said[key]) == 3 and all(0 <= float(number) <= 1 for number in said[key]) for key in ("mean", "std")):
            return repo, {**said, "input_size": [int(size) for size in sizes]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # whoever asks says that the input isn't known
    return repo, None


def _known(repo: str) -> Mapping[str, Any] | None:
    """Return timm's own description of the input of the weights in a repository."""
    name = repo.removeprefix("timm/")
    known = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    return known.to_dict() if known and known.hf_hub_id == repo else None


def _cached(repo: str, file: str, revision: str) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _file(repo: str, file: str, revision: str) -> Path | None:
    """Return a file out of the cache or the hub, None where the repository has none of this name."""
    if found := _cached(repo, file, revision):
        return found
    try:
        _ask(repo, revision, file)
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _ask(repo: str, revision: str, file: str) -> None:
    """Ask the hub for a file's header; any error where it has none, or doesn't answer in time."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    url = huggingface_hub.hf_hub_url(repo, file, revision=revision)
    _within(SECONDS, lambda: huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS))


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Call; raise what it raises, or a TimeoutError.  No limit of a request holds for name servers."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0]
