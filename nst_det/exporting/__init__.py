"""Backbones and detectors for other frameworks: written, compared with the original, described by a model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """What was written, by name, and how near it is to the original."""

    files: dict[str, Path]
    agreement: str
