"""Stands in for both stages: trains nothing, but writes, stops and goes on as they do.

A step appends a line to metrics.jsonl; a run goes on after the last line.  What it 'reaches' depends on row and
seed alone, like a training that is the same to the last bit.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import yaml

STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0.01"))


def number(*parts):
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:6], 16) / 16**6


def steps_of(folder, total):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    path.write_text("".join(line + "\n" for line in lines[:-1]))
    with open(folder / "starts.log", "a") as file:
        file.write(f"{len(lines) - 1} threads {os.environ['OMP_NUM_THREADS']}\n")
    for step in range(len(lines) - 1, total):
        time.sleep(STEP_SECONDS)
        with open(path, "a") as file:
            gpu = {"speed/gpu_memory_gib": float(os.environ.get("FAKE_GPU_GIB", 0))}
            row = {"step": step, "loss": 1 / (step + 1), **(gpu if os.environ["CUDA_VISIBLE_DEVICES"] else {})}
            file.write(json.dumps(row) + "\n")


def write(path, value):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def distill(config):
    output = Path(config["OUTPUT_DIR"])
    registry = Path(config["REGISTRY"])
    registry.mkdir(parents=True, exist_ok=True)
    words = config["METHODS"] or ["teacher"]
    for word in words:
        folder = output / "students" / word if config["METHODS"] else output / "teacher"
        if (folder / "result.json").exists():
            continue
        if config["METHODS"]:
            assert Path(config["TEACHER"]["WEIGHTS"]).exists()
        steps_of(folder, config["SOLVER"]["MAX_ITER"])
        name = f"{config['NAME']}-{word}-s{config['SEED']}" if config["METHODS"] else f"{config['NAME']}-teacher"
        (registry / f"{name}.safetensors").write_text(word)
        result = {"name": name, "top1": number(word, config["SEED"]), "top5": 1.0, "seconds": time.time() % 7}
        write(folder / "result.json", result)


def detect(config):
    folder = Path(config["OUTPUT_DIR"])
    weights = config["MODEL"]["WEIGHTS"]
    word = Path(weights).read_text() if weights else "scratch"
    if word == os.environ.get("FAKE_FAILS"):
        while not Path(os.environ.get("FAKE_FAILS_AFTER", ".")).exists():
            time.sleep(0.01)
        print("nst-det: the images are gone; bring them back", file=sys.stderr)
        sys.exit(int(os.environ["FAKE_CODE"]))
    steps_of(folder, config["SOLVER"]["MAX_ITER"])
    ap = {name: number(word, config["SEED"], name) for name in ("cup", "hat")}
    mean = sum(ap.values()) / 2
    result = {"map": mean, "map_area": mean / 2, "per_class": ap, "per_class_area": ap, "engine": config["ENGINE"]}
    write(folder / "result.json", result | {"seconds": time.time() % 7, "params": 7, "coco": {"AP": mean / 3}})


if __name__ == "__main__":
    if parent := os.environ.get("FAKE_PARENT_DIES"):
        from nst_det.engine.signals import end_with_parent

        end_with_parent(os.getppid() if parent == "any" else int(parent))
    config = yaml.safe_load(Path(sys.argv[3]).read_text())
    {"distill": distill, "train-det": detect}[sys.argv[1]](config)
