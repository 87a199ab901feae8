"""Both stages and the commands on GPUs that are only pretended: see ``tests/helpers/pretended_cuda.py``.

``python tests/device/test_pretended_cuda.py [GROUP ...]`` prints :data:`MOST` as it is now.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]
GROUPS = ("stage one", "stage two", "commands", "workers", "detectron2")
# operators that launch something, and waits of the host: of a term forward and backward, of a training step, of an
# evaluation
MOST: dict[str, tuple[int, int]] = {
    "loss kd": (18, 0),
    "loss fitnet": (14, 0),
    "loss at": (66, 0),
    "loss nst-linear": (42, 0),
    "loss nst-poly": (64, 0),
    "loss nst-gaussian": (100, 0),
    "loss vid": (74, 0),
    "loss vid-logits": (30, 0),
    "loss lp": (37, 0),
    "loss cwd": (42, 0),
    "loss pkd": (86, 0),
    "loss mgd": (46, 0),
    "loss sp": (60, 0),
    "loss rkd": (88, 0),
    "loss dkd": (55, 0),
    "loss dist": (89, 0),
    "loss reviewkd": (108, 0),
    "loss fgd": (291, 0),
    "stage one, ce": (170, 1),
    "stage one, kd+nst-poly": (390, 1),
    "stage one, nst-gaussian": (405, 1),
    "stage one, evaluation": (72, 1),
    "stage two, on the CPU": (0, 0),
    "stage two, ce, 16 images": (592, 2),
    "stage two, ce": (592, 2),
    "stage two, nst-poly@det": (886, 2),
    "stage two, cwd@det": (864, 2),
    "stage two, evaluation": (273, 10),
    "detectron2, ce": (1095, 71),
    "detectron2, nst-poly@det": (1257, 72),
    "detectron2, cwd@det": (1235, 72),
}


def run(group: str) -> dict:
    """What ``scenarios.py`` found in a group, by scenario."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, str(Path(__file__).with_name("scenarios.py")), group, file.name]
        ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return json.loads(Path(file.name).read_text())


def totals(seen: dict) -> tuple[int, int]:
    return sum(seen["launches"].values()), sum(seen["waits"].values())


def places(counts: dict[str, int], shown: int = 30) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])[:shown]
    return "".join(f"\n    {count:5} {place}" for place, count in most)


@pytest.mark.slow
@pytest.mark.parametrize(
    "group", [pytest.param(one, marks=pytest.mark.detectron2 if one == GROUPS[-1] else ()) for one in GROUPS]
)
def test_on_pretended_gpus(group):
    if group == "detectron2":
        pytest.importorskip("detectron2")
    # another torch may make other operators of the same code
    counts_hold = f"torch=={torch.__version__.partition('+')[0]}\n" in (CHECKOUT / "constraints.txt").read_text()
    faults = []
    for name, seen in run(group).items():
        if seen["error"]:
            faults.append(f"{name}: {seen['error']}")
        elif seen["counted"] and counts_hold:
            most = MOST.get(name, (0, 0))
            for what, count, allowed in zip(("launches", "waits"), totals(seen), most):
                if count > allowed:
                    faults.append(f"{name}: {count} {what}, {allowed} before:{places(seen[what])}")
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or GROUPS:
        for scenario, figures in run(chosen).items():
            if figures["error"]:
                print(f"{scenario}: {figures['error']}", file=sys.stderr)
            elif figures["counted"]:
                print(f'    "{scenario}": {totals(figures)},')
