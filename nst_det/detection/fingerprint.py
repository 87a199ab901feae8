"""What makes a run of stage two the run that it is, whatever the paths: fingerprints of its data and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from nst_det.data.voc import VocDataset
from nst_det.detection.config import set_names, voc_roots
from nst_det.engine.config import expand_path, flat, read_yaml
from nst_det.engine.io import sha256_of_file
from nst_det.engine.run_dir import config_hash
from nst_det.errors import UserError
from nst_det.models import resolve


def input_fingerprints(config: CfgNode, classes: Sequence[str] | None = None) -> dict[str, str]:
    """Return the fingerprints, by key, of what a config names by a path; data sets have ``classes``, or their own.

    What is no file here, such as a URL that Detectron2 knows, stands for itself.
    """
    found = {}
    # Detectron2 knows others
    own = [name for name in set_names(config) if name in config.DATASETS.VOC]
    for name, (root, split) in zip(own, voc_roots(config, own, "DATASETS")):
        found[f"DATASETS.VOC.{name}.FINGERPRINT"] = VocDataset(root, split, classes).fingerprint()
    for group in ("MODEL", "TEACHER"):
        found[f"{group}.WEIGHTS_SHA256"] = of_weights(config[group].WEIGHTS, f"{group}.WEIGHTS")
    named = config.TEACHER.CONFIG_FILE
    path = _file(named, "TEACHER.CONFIG_FILE")
    tree: dict[str, Any] = {}
    found["TEACHER.CONFIG_HASH"] = named
    if path and path.suffix in (".yaml", ".yml"):
        try:
            tree = read_yaml(path)
            found["TEACHER.CONFIG_HASH"] = config_hash(flat(CfgNode(tree)))
        except UserError:
            # Detectron2 reads Python in a YAML too; whoever builds the teacher says what is wrong with it
            found["TEACHER.CONFIG_HASH"] = sha256_of_file(path)
    theirs = tree.get("MODEL")
    inner = theirs.get("WEIGHTS") if isinstance(theirs, dict) else None
    if inner and not config.TEACHER.WEIGHTS:
        found["TEACHER.WEIGHTS_SHA256"] = of_weights(str(inner), "TEACHER.CONFIG_FILE")
    return found


def of_weights(named: str, key: str) -> str:
    """Return the SHA-256 of the file that a key names; what is no file here stands for itself."""
    path = _file(named, key)
    return sha256_of_file(path) if path else named


def _file(named: str, key: str) -> Path | None:
    if not named:
        return None
    try:
        path = resolve(expand_path(named, key))
    except UserError:
        # whoever loads it says so
        return None
    return path if path.is_file() else None
