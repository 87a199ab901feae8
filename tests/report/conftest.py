"""A small comparison as ``nst-det compare`` leaves it: results, run folders, a VOC folder with images."""

import base64
import hashlib
import json
import math
import random
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from scipy import stats

from nst_det.comparison.result import ComparisonResult, from_json
from nst_det.report import write_report

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


def build_results(
    numbers: dict[str, Any] = NUMBERS, seeds: int = 3, classes: tuple[str, ...] = CLASSES
) -> dict[str, Any]:
    """``results.json`` with differences and intervals computed from the numbers by seed."""
    rows = [
        _row(method, maps[:seeds], top1, numbers["ce"][0][:seeds], classes) for method, (maps, top1) in numbers.items()
    ]
    return {
        "name": "shapes",
        "engine": "torchvision",
        "classes": list(classes),
        "rows": rows,
        "teacher": {"name": "shapes-teacher", "top1": 0.953, "steps": 400},
        "settings": {"ENGINE": "torchvision", "DISTILL.SOLVER.MAX_ITER": 200, "DETECT.SOLVER.MAX_ITER": 160},
        "provenance": {
            "versions": {"nst_det": "0.1.0", "torch": "2.14.1", "torchvision": "0.29.1", "timm": "1.0.31"},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "python": "3.11.8",
            "platform": "Linux-x86_64",
            "cpu_count": 2,
            "cuda": None,
            "command": "nst-det compare --config-file configs/compare/demo.yaml",
            "started": "2025-01-02T03:04:05+00:00",
        },
    }


def _row(method: str, maps: Any, top1: Any, baseline: Any, classes: tuple[str, ...]) -> dict[str, Any]:
    draw = random.Random(method)
    mean = statistics.fmean(maps)
    offsets = [draw.uniform(-0.15, 0.15) for _ in classes]
    differences = [a - b for a, b in zip(maps, baseline)]
    interval = None
    if len(maps) > 1:
        reach = stats.t.ppf(0.975, len(maps) - 1) * statistics.stdev(differences) / math.sqrt(len(maps))
        interval = [statistics.fmean(differences) - reach, statistics.fmean(differences) + reach]
    verdict = "single seed"
    if interval:
        verdict = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "noise"
    per_seed = {
        str(seed): {
            "map": value,
            "map_area": value * 1.03,
            **{key: {} for key in ("per_class", "per_class_area", "map_by_iou", "coco", "objects", "term_weights")},
            **{key: {} for key in ("speed_backbone", "speed_detector")},
            "top1": top1 and top1[seed],
            "backbone": f"shapes-{method}-s{seed}",
            **{"seconds": 46.0 + seed, "seconds_backbone": 11.0 + seed, "seconds_detector": 35.0},
            "run": f"detect/seed{seed}/{method}",
            "distill_run": top1 and f"distill/seed{seed}/students/{method}",
            "checkpoints": {
                "best": {"step": 120 + 20 * seed, "map": value * 0.95 + 0.01, "map_area": value},
                "last": {"step": 160, "map": value * 0.95, "map_area": value},
                "tested": "last",
            },
        }
        for seed, value in enumerate(maps)
    }
    return {
        "method": method,
        "map": mean,
        "map_std": statistics.stdev(maps) if len(maps) > 1 else None,
        "map_area": mean * 1.03,
        "stage": "backbone" if top1 and method != "ce" else "",
        "weights": "",
        "backbone": [],
        "seeds": list(range(len(maps))),
        "delta_vs_ce": 0.0 if method == "ce" else statistics.fmean(differences),
        "delta_interval": None if method == "ce" else interval,
        "verdict": "reference" if method == "ce" else verdict,
        "per_class": {name: min(max(mean + offset, 0.01), 0.99) for name, offset in zip(classes, offsets)},
        "per_class_area": {name: min(max(mean * 1.03 + offset, 0.01), 0.995) for name, offset in zip(classes, offsets)},
        "top1": top1 and statistics.fmean(top1[: len(maps)]),
        "seconds": 47.123,
        "seconds_backbone": 12.0 if top1 else 0.0,
        "seconds_detector": 35.123 if top1 else 47.123,
        "speed_backbone": {"images_per_second": 812.25, "data_wait": 0.125} if top1 else {},
        "speed_detector": {"images_per_second": 34.5, "data_wait": 0.5, "gpu_memory_gib": 3.25},
        "params": 1934567,
        "cost": {
            "run": "detect/seed0/ce",
            "parameters": 1934567,
            "macs": 1234567890,
            "flops": 2500000000,
            "size": [120, 160],
            "device": "cpu",
            "threads": 2,
            "machine": "AMD EPYC",
            "latency": {"median": 0.0421, "p10": 0.0402, "p90": 0.0511},
        },
        "map_by_iou": {str((50 + 5 * i) / 100): mean * (1 - 0.09 * i) for i in range(10)},
        "coco": {"AP": mean / 2, "AP50": mean, "AP75": mean / 2, "APs": mean / 3, "APm": mean / 1.5, "APl": None},
        "objects": {"small": 12, "medium": 30, "large": 0},
        "per_seed": per_seed,
        "commands": [
            f"OMP_NUM_THREADS=1 nst-det {word} --config-file output/shapes/configs/{name}.yaml"
            for seed in range(len(maps))
            for word, name in (("distill", f"distill/seed{seed}"), ("train-det", f"detect/seed{seed}/{method}"))
        ],
    }


def build_runs(folder: Path, results: dict[str, Any]) -> None:
    """The run folders that results name, with a VOC folder of 16 images that they were tested on."""
    truth = write_voc(folder / "data", results["classes"])
    for row in results["rows"]:
        for seed, entry in row["per_seed"].items():
            draw = random.Random(f"{row['method']}-{seed}")
            run = folder / entry["run"]
            run.mkdir(parents=True)
            config = {"DATASETS.TEST": ["shapes_test"], "DATASETS.VOC.shapes_test.SPLIT": "test", "SEED": int(seed)}
            config["DATASETS.VOC.shapes_test.ROOT"] = str(folder / "data")
            (run / "config.json").write_text(json.dumps(config))
            found = _detections(truth, entry["map"], results["classes"], draw)
            (run / "detections.json").write_text(json.dumps(found))
            terms = {"loss_cls": 0.6, "loss_box_reg": 0.3, "loss_rpn_cls": 0.4, "loss_rpn_loc": 0.15}
            write_metrics(run, terms, 1 - 0.7 * entry["map"], draw)
            if entry["distill_run"]:
                student = folder / entry["distill_run"]
                student.mkdir(parents=True)
                terms = {f"loss/{term}": 2.5 for term in ("ce", *row["method"].replace("ce", "").split("+")) if term}
                if "nst" in row["method"]:
                    terms |= {"level/nst-poly@res3": 0.01, "level/nst-poly@res4": 0.04}
                write_metrics(student, {**terms, "loss/total": 5.0}, 0.2, draw, entry["top1"])


def write_metrics(
    run: Path, terms: dict[str, float], floor: float, draw: random.Random, top1: float | None = None
) -> None:
    """Losses that fall towards ``floor`` times their start, and top-1 every 25 steps."""
    lines = []
    for step in range(STEPS):
        falling = floor + (1 - floor) * math.exp(-step / 40)
        line: dict[str, Any] = {name: start * falling * draw.uniform(0.8, 1.2) for name, start in terms.items()}
        lines.append(json.dumps({"step": step, **line, "lr": 0.01, "data_time": 0.1}))
        if top1 is not None and (step + 1) % 25 == 0:
            now = top1 * (1 - 0.6 * math.exp(-step / 50))
            lines.append(json.dumps({"step": step, "val/top1": now, "val/top5": min(1.0, now + 0.1)}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


Objects = dict[str, list[tuple[str, tuple[int, int, int, int], bool]]]


def write_voc(root: Path, classes: list[str]) -> Objects:
    """A VOC folder of 16 images with 1 to 5 objects; gives (class, xmin ymin xmax ymax as on disk, difficult)."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    truth: Objects = {}
    for index in range(16):
        draw = random.Random(index)
        image_id = f"{index:06d}"
        objects = []
        image = Image.frombytes("L", SIZE, draw.randbytes(SIZE[0] * SIZE[1])).convert("RGB")
        image = Image.blend(image, Image.new("RGB", SIZE, _color(draw)), 0.75)
        pen = ImageDraw.Draw(image)
        for _ in range(draw.randint(1, 5)):
            left, top, side = draw.randint(1, 110), draw.randint(1, 70), draw.randint(22, 46)
            box = (left, top, min(left + side, SIZE[0]), min(top + side, SIZE[1]))
            shape = draw.choice((pen.ellipse, pen.rectangle))
            shape((box[0] - 1, box[1] - 1, box[2] - 1, box[3] - 1), fill=_color(draw), outline=(20, 20, 20))
            objects.append((draw.choice(classes), box, draw.random() < 0.1))
        image.save(root / "JPEGImages" / f"{image_id}.jpg", quality=90)
        (root / "Annotations" / f"{image_id}.xml").write_text(_xml(image_id, objects), encoding="utf-8")
        truth[image_id] = objects
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n".join(truth) + "\n")
    return truth


def _color(draw: random.Random) -> tuple[int, int, int]:
    return draw.randint(30, 230), draw.randint(30, 230), draw.randint(30, 230)


def _xml(image_id: str, objects: Any) -> str:
    from xml.sax.saxutils import escape

    text = f"<annotation><filename>{image_id}.jpg</filename><size><width>{SIZE[0]}</width>"
    text += f"<height>{SIZE[1]}</height><depth>3</depth></size>"
    for name, box, difficult in objects:
        corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        text += f"<object><name>{escape(name)}</name><difficult>{int(difficult)}</difficult>"
        text += f"<bndbox>{corners}</bndbox></object>"
    return text + "</annotation>"


def _detections(truth: Any, quality: float, classes: list[str], draw: random.Random) -> list[dict[str, Any]]:
    found = []
    for image_id, objects in truth.items():
        for name, (xmin, ymin, xmax, ymax), _ in objects:
            if draw.random() < quality:
                shift = [draw.uniform(-2, 2) for _ in range(4)]
                bbox = [
                    xmin - 1 + shift[0],
                    ymin - 1 + shift[1],
                    xmax - xmin + 1 + shift[2],
                    ymax - ymin + 1 + shift[3],
                ]
                found.append({"image_id": image_id, "category": name, "bbox": bbox, "score": draw.uniform(0.55, 0.99)})
        if draw.random() < 0.5 * (1 - quality):
            bbox = [draw.uniform(0, 100), draw.uniform(0, 60), 40.0, 40.0]
            category = draw.choice(classes)
            found.append({"image_id": image_id, "category": category, "bbox": bbox, "score": draw.uniform(0.5, 0.8)})
        bbox = [draw.uniform(0, 100), draw.uniform(0, 60), 30.0, 30.0]
        found.append({"image_id": image_id, "category": draw.choice(classes), "bbox": bbox, "score": 0.1})
    return found


def typed(tree: dict[str, Any]) -> ComparisonResult:
    """What ``results.json`` with this content is read as."""
    result: ComparisonResult = from_json(ComparisonResult, json.loads(json.dumps(tree)), "results.json", "")
    return result


@pytest.fixture(scope="session")
def as_results() -> Callable[[dict[str, Any]], ComparisonResult]:
    """:func:`typed`, for tests."""
    return typed


@pytest.fixture(scope="session")
def make_results() -> Callable[..., dict[str, Any]]:
    """:func:`build_results`, for tests."""
    return build_results


@pytest.fixture(scope="session")
def write_runs() -> Callable[[Path, dict[str, Any]], None]:
    """:func:`build_runs`, for tests."""
    return build_runs


def browse(html: str, script: str, width: int, folder: Path) -> str:
    """What a script on a page says by ``tell(text)``, in headless Chromium; the test is skipped without Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")
    script = f"const tell = (text) => parent.postMessage(text, '*');\n{script}"
    # the script is one more inline script, so the policy gets its hash; in all else it is the page itself
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    (folder / "page.html").write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    # a frame, because a window can't be as narrow as a phone
    frame = f"<body><iframe src=page.html style='width:{width}px;height:900px;border:0'></iframe>"
    frame += "<script>onmessage = (event) => { document.title = event.data; };</script>"
    (folder / "frame.html").write_text(frame)
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1500,900", "--virtual-time-budget=20000"]
    done = subprocess.run(
        [*command, f"file://{folder}/frame.html"], capture_output=True, text=True, timeout=180, check=True
    )
    assert ":CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, "the script said nothing"
    return unescape(title[1])


@pytest.fixture(scope="session")
def in_browser() -> Callable[[str, str, int, Path], str]:
    """:func:`browse`, for tests."""
    return browse


@pytest.fixture(scope="session")
def voc_truth(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """What stands on the images of every comparison here: image to (class, box as on disk, difficult)."""
    return write_voc(tmp_path_factory.mktemp("voc"), list(CLASSES))


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished comparison with three seeds: its folder (report written) and its results."""
    folder = tmp_path_factory.mktemp("comparison")
    results = build_results()
    build_runs(folder, results)
    write_report(typed(results), folder / "report", folder)
    (folder / "report" / "results.json").write_text(json.dumps(results))
    return folder, results
