"""Stands in for both stages: trains nothing, and scores a setting by how near it is to one that is best.

Every start of a run folder is a line in its ``starts.log``, and what a real stage would read is checked.
"""

import json
import math
from pathlib import Path

import yaml

from nst_det.comparison.launch_local import RunFailed
from nst_det.data.synthetic import SETTINGS_FILE

# of each term, where it is best
BEST = {"kd": 3.0, "at": 40.0, "nst-poly": 20.0, "cwd": 5.0}


def score(method, node, seed):
    """1 at the best weights on res4 or p4; a tenth less for each factor of ten, and for other levels."""
    terms = method.split("+") if method != "ce" else []
    off = sum(abs(math.log10(node["WEIGHTS"][term] / BEST[term])) for term in terms)
    levels = 0 if node["LEVELS"][-1][-1] == "4" else 1
    return 1 - off / 10 - levels / 10 - seed / 1000


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def note(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "starts.log", "a") as file:
        file.write("begun\n")


def distill(config):
    assert (config["DATA"]["VAL_FROM"], config["DATA"]["VAL_FRACTION"]) == ("train", 0.25)
    output, registry = Path(config["OUTPUT_DIR"]), Path(config["REGISTRY"])
    registry.mkdir(parents=True, exist_ok=True)
    for word in config["METHODS"] or ["teacher"]:
        folder = output / "students" / word if config["METHODS"] else output / "teacher"
        if (folder / "result.json").exists():
            continue
        note(folder)
        if (folder / "fails").exists():
            raise RunFailed("run failed: the images are gone; bring them back", 2)
        if config["METHODS"]:
            assert Path(config["TEACHER"]["WEIGHTS"]).exists()
        name = f"{config['NAME']}-{word}-s{config['SEED']}" if config["METHODS"] else f"{config['NAME']}-teacher"
        (registry / f"{name}.safetensors").write_text(word)
        node = config["TRANSFER"]
        own = {**node, **node["BY_METHOD"].get(word, {})}
        top1 = 0.5 if word in ("teacher", "ce") else score(word, own, config["SEED"])
        write(folder / "result.json", {"name": name, "top1": top1, "steps": config["SOLVER"]["MAX_ITER"]})


def detect(config):
    assert config["DATASETS"]["VAL_FRACTION"] == 0.25
    assert list(config["DATASETS"]["TEST"]) == []
    folder, node = Path(config["OUTPUT_DIR"]), config["TRANSFER"]
    note(folder)
    assert Path(config["MODEL"]["WEIGHTS"]).exists()
    if config["METHOD"] != "ce":
        assert Path(config["TEACHER"]["WEIGHTS"]).exists()
        value = score(config["METHOD"], node, config["SEED"])
    else:
        value = 0.25
    (folder / "model.safetensors").write_text("detector")
    write(folder / "result.json", {"validation": {"map": value}, "steps": config["SOLVER"]["MAX_ITER"]})


def generate(words):
    root = Path(words[words.index("--output") + 1])
    note(root)
    write(root / SETTINGS_FILE, {})


def do(command, config_file):
    if command[0] == "generate-data":
        generate(command)
    else:
        {"distill": distill, "train-det": detect}[command[0]](yaml.safe_load(config_file.read_text()))
