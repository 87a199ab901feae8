"""What the detectors of a comparison cost at use: arithmetic and latency, once for each architecture."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from nst_det.benchmark import Batched, benchmark, photo_size
from nst_det.comparison.plan import DETECTOR, Run
from nst_det.comparison.result import BASELINE, Cost, Latency
from nst_det.detection.config import resolve_device
from nst_det.detection.predict import load_run
from nst_det.engine.config import flat, plain
from nst_det.engine.device import gpu_errors_in_one_line
from nst_det.engine.fingerprint import FORWARD, concerns
from nst_det.engine.io import from_json, read_json, write_json
from nst_det.engine.machine import machine_name
from nst_det.engine.run_dir import config_hash
from nst_det.errors import UserError

log = logging.getLogger(__name__)
COST_FILE = "cost.json"
REPEATS = 20


def architecture(config: CfgNode) -> str:
    """Return twelve digits, equal for detectors that compute the same."""
    return config_hash({key: value for key, value in plain(flat(config)).items() if concerns(key, FORWARD)})


def measure_costs(runs: Sequence[Run], configs: Mapping[str, CfgNode], folder: Path) -> dict[str, Cost]:
    """Return the cost of each row's detector, by row; rows of one architecture share one measurement.

    :data:`COST_FILE` keeps it.  A row whose detector can't be built again is left out, with a warning.
    """
    path = folder / COST_FILE
    remedy = "remove the file to measure again"
    known: dict[str, Cost] = from_json(dict[str, Cost], read_json(path), str(path), remedy) if path.exists() else {}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == DETECTOR:
            groups.setdefault(architecture(configs[run.name]), []).append(run)
    for name, group in groups.items():
        if name not in known:
            chosen = next((run for run in group if run.row == BASELINE), group[0])
            try:
                known[name] = _measure(chosen, configs[chosen.name])
            except UserError as error:
                log.warning("no latency of %s: %s", chosen.name, error)
                continue
            write_json(path, {name: asdict(cost) for name, cost in known.items()})
    return {str(run.row): known[name] for name, group in groups.items() if name in known for run in group}


def _measure(run: Run, config: CfgNode) -> Cost:
    device = torch.device(resolve_device(config.MODEL.DEVICE))
    log.info("%s: measuring its cost", run.name)
    size = photo_size(config)
    with gpu_errors_in_one_line("compare again, which measures what is missing"):
        if config.ENGINE == "detectron2":
            from nst_det.detectron2 import parity

            detector = parity.load_run(run.folders[0], config, device)
            network = Batched(detector, partial(parity.detect, postprocess=False))
        else:
            network = Batched(load_run(run.folders[0], device)[0])
        figures = benchmark(network, size, [1], REPEATS, device)
    latency = figures["latency"][0]
    return Cost(
        run=run.name,
        size=(size[0], size[1]),
        device=str(device),
        threads=torch.get_num_threads(),
        machine=machine_name(str(device)),
        latency=Latency(latency["median"], latency["p10"], latency["p90"]),
        **{key: figures[key] for key in ("parameters", "macs")},
    )
