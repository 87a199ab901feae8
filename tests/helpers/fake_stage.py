"""Stands in for both stages: trains nothing, but writes, stops and resumes as they do.

A step appends a line to metrics.jsonl; a run resumes after the last line.  What a run reaches depends on method,
settings and seed alone.  The nearer a weight is to its best one, the better; every start is a line in starts.log.
"""

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import yaml

# of each term, where it is best
BEST = {"kd": 3.0, "at": 40.0, "nst-poly": 20.0, "cwd": 5.0}


def draw(*parts):
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:6], 16) / 16**6


def score(method, node, seed):
    """1 at the best weights on res4 or p4; a tenth less for each factor of ten, and for other levels."""
    terms = method.split("+") if method != "ce" else []
    off = sum(abs(math.log10(node["WEIGHTS"].get(term, 1.0) / BEST.get(term, 1.0))) for term in terms)
    levels = 0 if node["LEVELS"] and node["LEVELS"][-1].endswith("4") else 1
    return 1 - off / 10 - levels / 10 - seed / 1000


def fail(code):
    print("nst-det: the images are gone; bring them back", file=sys.stderr)
    sys.exit(code)


def end_if_not_finite(folder, method, node):
    """FAKE_NOT_FINITE "at 10": a weight of at above 10 is too large."""
    term, _, most = os.environ.get("FAKE_NOT_FINITE", "").partition(" ")
    if term in method.split("+") and node["WEIGHTS"].get(term, 1.0) > float(most):
        write(folder / "nonfinite" / "ended.json", {"step": 0})
        fail(2)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def train(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    path.write_text("".join(line + "\n" for line in lines[:-1]))
    with open(folder / "starts.log", "a") as file:
        file.write(f"{len(lines) - 1} threads {os.environ.get('OMP_NUM_THREADS')}\n")
    if (folder / "fails").exists():
        fail(2)
    speed = {"speed/gpu_memory_gib": float(os.environ.get("FAKE_GPU_GIB", 0))}
    for step in range(len(lines) - 1, steps):
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.01")))
        row = {"step": step, "loss": 1 / (step + 1), **(speed if os.environ.get("CUDA_VISIBLE_DEVICES") else {})}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def distill(config):
    registry, methods, node, seed = Path(config["REGISTRY"]), config["METHODS"], config["TRANSFER"], config["SEED"]
    registry.mkdir(parents=True, exist_ok=True)
    for method in methods or ["teacher"]:
        folder = Path(config["OUTPUT_DIR"], "students" if methods else "", method)
        if (folder / "result.json").exists():
            continue
        assert not methods or Path(config["TEACHER"]["WEIGHTS"]).exists()
        own = {**node, **node["BY_METHOD"].get(method, {})}
        end_if_not_finite(folder, method, own)
        # a teacher may be taken as it is
        taken = not methods and not (config["TEACHER"]["TRAIN"] and config["DATA"]["LABELS"])
        steps = 0 if taken else config["SOLVER"]["MAX_ITER"]
        train(folder, steps)
        name = f"{config['NAME']}-{method}" + (f"-s{seed}" if methods else "")
        (registry / f"{name}.safetensors").write_text(method)
        (registry / f"{name}.json").write_text("{}")
        top1 = score(method, own, seed) if methods else 0.5
        result = {"name": name, "top1": top1, "top5": 1.0, "seconds": time.time() % 7}
        write(folder / "result.json", result | {"steps": steps})


def detect(config):
    folder, weights = Path(config["OUTPUT_DIR"]), config["MODEL"]["WEIGHTS"]
    method, seed = config["METHOD"], config["SEED"]
    word = Path(weights).read_text() if weights else "scratch"
    if word == os.environ.get("FAKE_FAILS"):
        while not Path(os.environ.get("FAKE_FAILS_AFTER", ".")).exists():
            time.sleep(0.01)
        fail(int(os.environ["FAKE_CODE"]))
    assert method == "ce" or Path(config["TEACHER"]["WEIGHTS"]).exists()
    end_if_not_finite(folder, method, config["TRANSFER"])
    train(folder, config["SOLVER"]["MAX_ITER"])
    (folder / "model.safetensors").write_text("detector")
    mean = draw(word, seed) if method == "ce" else score(method, config["TRANSFER"], seed)
    ap = {"cup": mean - 1e-3, "hat": mean + 1e-3}
    result = {"map": mean, "map_area": mean / 2, "per_class": ap, "per_class_area": ap, "engine": config["ENGINE"]}
    result |= {"validation": {"map": mean}, "steps": config["SOLVER"]["MAX_ITER"], "coco": {"AP": mean / 3}}
    write(folder / "result.json", result | {"seconds": time.time() % 7, "params": 7})


def do(command):
    """Do what follows ``nst-det``."""
    if command[0] == "generate-data":
        root = Path(command[command.index("--output") + 1])
        train(root, 0)
        write(root / "settings.json", {})
    else:
        {"distill": distill, "train-det": detect}[command[0]](yaml.safe_load(Path(command[2]).read_text()))


if __name__ == "__main__":
    if parent := os.environ.get("FAKE_PARENT_DIES"):
        from nst_det.engine.signals import end_with_parent

        end_with_parent(os.getppid() if parent == "any" else int(parent))
    do(sys.argv[1:])
