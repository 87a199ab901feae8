"""What is deployed: each exported file of a detector beside PyTorch, by accuracy, time, size and memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from nst_det.comparison.result import ComparisonResult
from nst_det.engine.io import from_json, read_json, write_json, write_text
from nst_det.errors import UserError
from nst_det.report.tables import MISSING, fraction, signed

log = logging.getLogger(__name__)
# in the folder of a run
DEPLOYED_FILE = "deployed.json"
PYTORCH = "pytorch"
NAMES = {PYTORCH: "PyTorch", "onnx": "ONNX", "openvino": "OpenVINO", "torch-export": "torch.export"}
COLUMNS = (
    *("file", "images", "mAP", "difference", "most lost", "median ms", "p10", "p90", "p99", "time/PyTorch's"),
    *("images/s", "MB", "size/PyTorch's", "peak MB"),
)
MB = 1e6


@dataclass(frozen=True)
class Deployed:
    """One file, or PyTorch itself, on the test split and on one machine.

    Attributes:
        form: ``pytorch``, or as ``nst-det export --format`` names it.
        precision: ``fp32``, ``fp16`` or ``int8``.
        batch: images a call.
        map: 11-point mAP on the test split, 0..1; None where it was not measured.
        per_class: 11-point AP by class.
        latency: seconds of a call from resized pixels to boxes: ``p10``, ``median``, ``p90`` and ``p99``.
        ratio: median of its calls' time as a part of PyTorch's, call by call in turns; None without PyTorch.
        size: bytes of the file, or of the files, that are shipped.
        memory: largest resident memory of a process that detects on one image, in bytes; None where not known.
        threads: of the CPU.
        machine: its processor.
    """

    form: str
    precision: str
    batch: int
    map: float | None
    per_class: dict[str, float | None]
    latency: dict[str, float]
    ratio: float | None
    size: int
    memory: int | None
    threads: int
    machine: str

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{NAMES[self.form]} {self.precision}"

    @property
    def key(self) -> tuple[str, str, int]:
        """What a run has one of."""
        return self.form, self.precision, self.batch


def read_deployed(run: Path) -> list[Deployed]:
    """Return what was measured of a run's files; [] where nothing was."""
    path = run / DEPLOYED_FILE
    remedy = "remove it and measure again"
    found: list[Deployed] = from_json(list[Deployed], read_json(path), str(path), remedy) if path.is_file() else []
    return found


def add_deployed(run: Path, rows: Iterable[Deployed]) -> list[Deployed]:
    """Write rows to those of a run, in place of older ones of the same files, as JSON and Markdown; return all."""
    kept = {row.key: row for row in (*read_deployed(run), *rows)}
    order = [*NAMES]
    merged = sorted(kept.values(), key=lambda row: (row.batch, order.index(row.form), row.precision != "fp32", row.key))
    write_json(run / DEPLOYED_FILE, [asdict(row) for row in merged])
    write_text((run / DEPLOYED_FILE).with_suffix(".md"), markdown(merged))
    return merged


def lines(rows: Sequence[Deployed]) -> list[list[str]]:
    """Return the cells of each row, by :data:`COLUMNS`."""
    return [_cells(row, next((one for one in rows if one.form == PYTORCH), None)) for row in rows]


def _cells(row: Deployed, torch: Deployed | None) -> list[str]:
    other = torch is not None and row.form != PYTORCH
    lost = differences(row, torch) if torch is not None and other else {}
    worst = min(lost, key=lambda name: lost[name]) if lost else None
    known = torch is not None and other and row.map is not None and torch.map is not None
    return [
        row.name,
        str(row.batch),
        fraction(row.map, 4),
        signed((row.map or 0.0) - (torch.map or 0.0), 4) if known and torch is not None else MISSING,
        f"{worst} {signed(lost[worst], 4)}" if worst is not None else MISSING,
        *(f"{1000 * row.latency[name]:.1f}" for name in ("median", "p10", "p90", "p99")),
        MISSING if row.ratio is None or not other else fraction(row.ratio, 2),
        f"{row.batch / row.latency['median']:.1f}",
        f"{row.size / MB:.2f}",
        fraction(row.size / torch.size, 2) if torch is not None and other else MISSING,
        MISSING if row.memory is None else f"{row.memory / MB:.0f}",
    ]


def differences(row: Deployed, torch: Deployed) -> dict[str, float]:
    """Return AP less PyTorch's, by class that has both."""
    pairs = {name: (ap, torch.per_class.get(name)) for name, ap in row.per_class.items()}
    return {name: ap - theirs for name, (ap, theirs) in pairs.items() if ap is not None and theirs is not None}


def conditions(rows: Sequence[Deployed]) -> str:
    """Return on what the rows were measured."""
    machines = "; ".join(
        dict.fromkeys(f"{row.machine}, {row.threads} thread{'' if row.threads == 1 else 's'}" for row in rows)
    )
    return (
        f"{machines}. A call takes resized pixels and gives boxes; files and PyTorch are called in turns. "
        "mAP is the 11-point one on the test split, through the file itself; MB are 1,000,000 bytes, memory is that of "
        "a process that detects on one image."
    )


def markdown(rows: Sequence[Deployed]) -> str:
    """Return the rows as a Markdown table, with what they were measured on."""
    head = [" | ".join(COLUMNS), "---|" + ":|".join(["---"] * (len(COLUMNS) - 1)) + ":"]
    body = [" | ".join(cells) for cells in lines(rows)]
    return "\n".join(f"| {line} |" for line in (head[0], *body)).replace("|\n", f"|\n|{head[1]}|\n", 1) + (
        f"\n\n{conditions(rows)}\n"
    )


def table(rows: Sequence[Deployed], title: str) -> Table:
    """Return the rows for a terminal."""
    shown = Table(title=title, caption=conditions(rows))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("file", "most lost") else "right")
    for cells in lines(rows):
        shown.add_row(*cells)
    return shown


def deployed_rows(results: ComparisonResult, runs: Path) -> Mapping[str, list[Deployed]]:
    """Return what was measured of the first seed of each row that has files; runs are relative to ``runs``."""
    found: dict[str, list[Deployed]] = {}
    for row in results.rows:
        for one in row.per_seed.values():
            try:
                rows = read_deployed(runs / str(one.run)) if one.run else []
            except UserError as error:
                log.warning("%s: nothing of its files in the report: %s", row.method, error)
                continue
            if rows:
                found.setdefault(row.method, rows)
    return found
