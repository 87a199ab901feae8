"""A small comparison as ``nst-det compare`` leaves it: results, run folders, a VOC folder with images."""

import copy
import json
import math
import random
import statistics
from dataclasses import asdict

from PIL import Image

from nst_det.comparison.result import ComparisonResult
from nst_det.comparison.statistics import mean_std, paired_difference
from nst_det.data.annotation import VocAnnotation, VocObject, voc_xml
from nst_det.engine.io import from_json

CLASSES = ("arrow", "bolt", "crescent", "cross", "heart", "hexagon", "ring", "star")
# method -> (mAP by seed, top-1 by seed)
NUMBERS = {
    "scratch": ((0.115, 0.096, 0.107), None),
    "ce": ((0.572, 0.461, 0.464), (0.732, 0.709, 0.728)),
    "kd": ((0.658, 0.503, 0.564), (0.789, 0.768, 0.774)),
    "fitnet": ((0.8123, 0.8019, 0.8187), (0.921, 0.904, 0.914)),
    "at": ((0.532, 0.522, 0.515), (0.734, 0.716, 0.734)),
    "nst-poly": ((0.7575, 0.7216, 0.7389), (0.879, 0.867, 0.873)),
    "kd+nst-poly": ((0.7451, 0.7482, 0.7479), (0.888, 0.866, 0.877)),
}
STEPS = 200
SIZE = (160, 120)
COST = {
    **{"run": "detect/seed0/ce", "parameters": 1934567, "macs": 1250000000, "flops": 2500000000, "size": [120, 160]},
    **{"device": "cpu", "threads": 2, "machine": "AMD EPYC"},
    "latency": {"median": 0.0421, "p10": 0.0402, "p90": 0.0511},
}


def build_results(numbers=NUMBERS, seeds=3, classes=CLASSES, begin=""):
    """The content of ``results.json``; ``begin`` are published weights that all students begin from."""
    rows = [build_row(method, maps[:seeds], top1, numbers, classes) for method, (maps, top1) in numbers.items()]
    for row in rows if begin and "imagenet" in numbers else ():
        own, other = (dict(enumerate(numbers[name][0][:seeds])) for name in (row["method"], "imagenet"))
        one = asdict(paired_difference(own, other))
        row["vs_imagenet"] = one if row["method"] != "imagenet" else {**one, "interval": None, "verdict": "reference"}
    return {
        "name": "shapes",
        "engine": "torchvision",
        "published": ["nst-voc07"],
        "classes": list(classes),
        "rows": rows,
        "student_weights": begin,
        "teacher": {"name": "shapes-teacher", "top1": 0.953, "steps": 400},
        "settings": {"ENGINE": "torchvision", "DISTILL.SOLVER.MAX_ITER": 200},
        "provenance": {"versions": {"torch": "2.14.1"}, "platform": "Linux-x86_64", "cuda": None},
    }


def without_detectors(tree):
    """The same numbers as those of a comparison of stage one alone: its students have the top-1 that mAP was."""
    tree = copy.deepcopy(tree) | {"engine": "", "classes": [], "published": ["vid-cifar10-100"]}
    tree["rows"] = [row for row in tree["rows"] if row["method"] not in ("scratch", "imagenet", "teacher")]
    for row in tree["rows"]:
        for one in (row, *row["per_seed"].values()):
            one |= {"top1": one["map"], "top1_std": one.get("map_std")}
            one |= dict.fromkeys(("map", "map_std", "map_area", "cost", "checkpoints", "run", "vs_imagenet"))
            empty = ("per_class", "per_class_area", "map_by_iou", "coco", "objects", "objects_per_class")
            one |= {key: {} for key in (*empty, "speed_detector")}
            one["seconds_detector"] = 0.0
    return tree


def build_row(method, maps, top1, numbers, classes):
    draw = random.Random(method)
    mean, std = mean_std(maps)
    offsets = {name: draw.uniform(-0.15, 0.15) for name in classes}
    baseline = numbers["ce"][0]
    difference = paired_difference(dict(enumerate(maps)), dict(enumerate(baseline)))
    is_baseline = method == "ce"
    return {
        "method": method,
        "map": mean,
        "map_std": std,
        "map_area": mean * 1.03,
        "stage": "backbone" if top1 and not is_baseline else "",
        **{"weights": [], "differs": []},
        "backbone": [],
        "seeds": list(range(len(maps))),
        "delta_vs_ce": difference.mean,
        "delta_interval": None if is_baseline else difference.interval,
        "verdict": "reference" if is_baseline else difference.verdict,
        "per_class": {name: min(max(mean + offset, 0.01), 0.99) for name, offset in offsets.items()},
        "per_class_area": {name: min(max(mean * 1.03 + offset, 0.01), 0.995) for name, offset in offsets.items()},
        "top1": top1 and statistics.fmean(top1[: len(maps)]),
        "seconds": 47.123,
        "seconds_backbone": 12.0 if top1 else 0.0,
        "seconds_detector": 35.123 if top1 else 47.123,
        "speed_backbone": {"images_per_second": 812.25, "data_wait": 0.125} if top1 else {},
        "speed_detector": {"images_per_second": 34.5, "data_wait": 0.5, "gpu_memory_gib": 3.25},
        "params": 1934567,
        "cost": copy.deepcopy(COST),
        "map_by_iou": {str((50 + 5 * i) / 100): mean * (1 - 0.09 * i) for i in range(10)},
        "coco": {"AP": mean / 2, "AP50": mean, "AP75": mean / 2, "APs": mean / 3, "APm": mean / 1.5, "APl": None},
        "objects": {"small": 12, "medium": 30, "large": 0},
        "objects_per_class": dict.fromkeys(classes, 120),
        "per_seed": {str(seed): build_seed(method, seed, value, top1) for seed, value in enumerate(maps)},
        "commands": [f"nst-det train-det --config-file detect/seed{seed}/{method}.yaml" for seed in range(len(maps))],
    }


def build_seed(method, seed, value, top1):
    empty = (
        "per_class per_class_area map_by_iou coco objects objects_per_class term_weights speed_backbone speed_detector"
    )
    best, last = ({"step": step, "map": value * 0.95 + extra} for step, extra in ((120 + 20 * seed, 0.01), (160, 0)))
    return {
        **{key: {} for key in empty.split()},
        "map": value,
        "map_area": value * 1.03,
        "top1": top1 and top1[seed],
        "backbone": f"shapes-{method}-s{seed}",
        **{"seconds": 46.0 + seed, "seconds_backbone": 11.0 + seed, "seconds_detector": 35.0},
        "run": f"detect/seed{seed}/{method}",
        "distill_run": top1 and f"distill/seed{seed}/students/{method}",
        "checkpoints": {"best": best, "last": last, "tested": "last"},
    }


def typed(tree):
    """What ``results.json`` with this content is read as."""
    return from_json(ComparisonResult, json.loads(json.dumps(tree)), "results.json", "")


def build_runs(folder, results):
    """Write the run folders that results name, and the VOC folder that they were tested on; return its objects."""
    truth = write_voc(folder / "data", results["classes"])
    data = {"SPLIT": "test", "ROOT": str(folder / "data")}
    config = {f"DATASETS.{part}": ["shapes"] for part in ("TRAIN", "TEST")}
    config |= {f"DATASETS.VOC.shapes.{key}": value for key, value in data.items()}
    for row in results["rows"]:
        for seed, entry in row["per_seed"].items():
            draw = random.Random(f"{row['method']}-{seed}")
            run = folder / entry["run"]
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps(config))
            found = [
                box for id_ in truth for box in detections(id_, truth[id_], entry["map"], results["classes"], draw)
            ]
            (run / "detections.json").write_text(json.dumps(found))
            (run / "result.json").write_text(json.dumps({"thresholds": thresholds(results["classes"], entry["map"])}))
            terms = {"loss_cls": 0.6, "loss_box_reg": 0.3, "loss_rpn_cls": 0.4, "loss_rpn_loc": 0.15}
            write_metrics(run, terms, 1 - 0.7 * entry["map"], draw)
            if entry["distill_run"]:
                terms = {f"loss/{term}": 2.5 for term in ("ce", *row["method"].replace("ce", "").split("+")) if term}
                if "nst" in row["method"]:
                    terms |= {"level/nst-poly@res3": 0.01, "level/nst-poly@res4": 0.04}
                student = folder / entry["distill_run"]
                student.mkdir(parents=True)
                write_metrics(student, {**terms, "loss/total": 5.0}, 0.2, draw, entry["top1"])
    write_files(folder / results["rows"][-1]["per_seed"]["0"]["run"], results["rows"][-1]["per_class"])
    return truth


def write_files(run, per_class):
    """What was measured of three files of a run, the last one for eight images, beside PyTorch."""
    shared = {"threads": 2, "machine": "AMD EPYC"}
    latency = {"p10": 0.019, "median": 0.02, "p90": 0.023, "p99": 0.04}
    rows = []
    for form, precision, batch, lost, part in (
        ("pytorch", "fp32", 1, 0.0, 1.0),
        ("onnx", "fp32", 1, 0.0, 0.75),
        ("onnx", "int8", 1, 0.01, 0.25),
        ("pytorch", "fp32", 8, 0.0, 1.0),
        ("openvino", "int8", 8, 0.02, 0.5),
    ):
        aps = {name: ap - lost * (index == 1) for index, (name, ap) in enumerate(per_class.items())}
        measured = {"map": statistics.fmean(aps.values()), "per_class": aps, "ratio": part, "memory": 80_000_000}
        times = {name: seconds * part * batch for name, seconds in latency.items()}
        file = {"form": form, "precision": precision, "batch": batch, "size": round(8_000_000 * part)}
        rows.append({**file, **measured, "latency": times, **shared})
    (run / "deployed.json").write_text(json.dumps(rows))


def thresholds(classes, quality):
    """All 0.5, with an F1 that falls from ``quality`` at it to both sides."""
    curve = [quality * (1 - abs(score - 25) / 50) for score in range(51)]
    return {name: {"score": 0.5, "f1": quality, "curve": curve} for name in classes}


def write_metrics(run, terms, floor, draw, top1=None):
    """Losses that fall towards ``floor`` times their start, and top-1 every 25 steps."""
    lines = []
    for step in range(STEPS):
        falling = floor + (1 - floor) * math.exp(-step / 40)
        losses = {name: start * falling * draw.uniform(0.8, 1.2) for name, start in terms.items()}
        lines.append({"step": step, **losses, "lr": 0.01, "data_time": 0.1})
        if top1 is not None and (step + 1) % 25 == 0:
            now = top1 * (1 - 0.6 * math.exp(-step / 50))
            lines.append({"step": step, "val/top1": now, "val/top5": min(1.0, now + 0.1)})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_voc(root, classes):
    """A VOC folder of 16 images with 1 to 5 objects; gives by image (class, box as on disk, difficult)."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    truth = {}
    for index in range(16):
        draw = random.Random(index)
        objects = []
        for _ in range(draw.randint(1, 5)):
            left, top, side = draw.randint(1, 110), draw.randint(1, 70), draw.randint(22, 46)
            box = (left, top, min(left + side, SIZE[0]), min(top + side, SIZE[1]))
            objects.append((draw.choice(classes), box, draw.random() < 0.1))
        truth[f"{index:06d}"] = objects
        Image.frombytes("RGB", SIZE, draw.randbytes(3 * SIZE[0] * SIZE[1])).save(root / f"JPEGImages/{index:06d}.jpg")
        found = tuple(VocObject(name, box, difficult=difficult) for name, box, difficult in objects)
        text = voc_xml(VocAnnotation(f"{index:06d}", *SIZE, found), f"{index:06d}.jpg")
        (root / f"Annotations/{index:06d}.xml").write_text(text, encoding="utf-8")
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n".join(truth) + "\n")
    return truth


def detections(image_id, objects, quality, classes, draw):
    """Some of the objects, perhaps a false one, and one with a low score."""
    found = []

    def add(category, bbox, score):
        found.append({"image_id": image_id, "category": category, "bbox": bbox, "score": score})

    for name, (xmin, ymin, xmax, ymax), _ in objects:
        if draw.random() < quality:
            bbox = [value + draw.uniform(-2, 2) for value in (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1)]
            add(name, bbox, draw.uniform(0.55, 0.99))
    if draw.random() < 0.5 * (1 - quality):
        add(draw.choice(classes), [draw.uniform(0, 100), draw.uniform(0, 60), 40.0, 40.0], draw.uniform(0.5, 0.8))
    add(draw.choice(classes), [draw.uniform(0, 100), draw.uniform(0, 60), 30.0, 30.0], 0.1)
    return found
