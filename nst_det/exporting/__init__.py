"""Backbones and detectors for other frameworks: written, compared with the original, described by a model card."""

from dataclasses import dataclass, field
from pathlib import Path

from nst_det.report.deployed import Deployed


@dataclass(frozen=True)
class Exported:
    """What was written, by name, how near it is to the original, and all that was measured of the run's files."""

    files: dict[str, Path]
    agreement: str
    deployed: list[Deployed] = field(default_factory=list)
