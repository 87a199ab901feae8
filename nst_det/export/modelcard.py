"""Model cards: Markdown with the metadata that the Hugging Face hub reads, from what a run wrote about itself.

Nothing is said that the run, or the backbone's card, doesn't say: what was not measured is called so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from huggingface_hub import EvalResult, ModelCardData

from nst_det.detection.predict import run_config
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.export.parity import Difference
from nst_det.models import Card, load_card

ONNX_USE = """\
```python
import numpy as np
import onnxruntime
from PIL import Image

CLASSES = {classes}
image = Image.open("image.jpg").convert("RGB")
width, height = image.size
scale = min({min_size} / min(width, height), {max_size} / max(width, height)) if {min_size} else 1.0
resized = image.resize((int(width * scale + 0.5), int(height * scale + 0.5)), Image.Resampling.BILINEAR)
session = onnxruntime.InferenceSession("{file}")
pixels = np.asarray(resized).transpose(2, 0, 1)
boxes, scores, labels = session.run(["boxes", "scores", "labels"], {{"image": pixels}})
# back to pixels of the original
boxes /= np.array([resized.width / width, resized.height / height] * 2, dtype=np.float32)
for box, score, label in zip(boxes, scores, labels):
    print(CLASSES[label], score, box)
```

Normalization, padding and non-maximum suppression are in the graph; `image` is uint8, (3, height, width), RGB.
"""

PROGRAM_USE = """\
```python
import numpy as np
import torch
import torchvision
from PIL import Image

CLASSES = {classes}
image = Image.open("image.jpg").convert("RGB")
width, height = image.size
scale = min({min_size} / min(width, height), {max_size} / max(width, height)) if {min_size} else 1.0
resized = image.resize((int(width * scale + 0.5), int(height * scale + 0.5)), Image.Resampling.BILINEAR)
detector = torch.export.load("{file}").module()
pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
boxes, scores, labels = detector(pixels)
# back to pixels of the original
boxes = boxes / boxes.new_tensor([resized.width / width, resized.height / height] * 2)
for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist()):
    print(CLASSES[label], score, box)
```

Normalization, padding and non-maximum suppression are in the program; `image` is uint8, (3, height, width), RGB.
"""

TIMM_USE = """\
```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True)
```

On the hub, `hf-hub:OWNER/NAME` takes the place of `local-dir:{name}`.
"""

OWN_ARCH_USE = """\
```python
import timm

import nst_det.models  # registers {arch} in timm

model = timm.create_model("{arch}", num_classes={num_classes}, checkpoint_path="{name}/model.safetensors")
```
"""

TORCHVISION_USE = """\
```python
import torch
import torchvision

model = torchvision.models.{arch}(num_classes={num_classes})
model.load_state_dict(torch.load("{name}", weights_only=True))
```
"""

DETECTRON2_USE = """\
```python
from detectron2.config import get_cfg
from detectron2.modeling import build_model

config = get_cfg()
# its MODEL.WEIGHTS names the weights, relative to where Detectron2 is started
config.merge_from_file("{config}")
model = build_model(config)
```
"""
LIBRARIES = {"onnx": "onnx", "torch-export": "pytorch", "timm": "timm", "torchvision": "torchvision"}
PAPER = "https://arxiv.org/abs/1707.01219"
TOPS = (("top1", "top-1"), ("top5", "top-5"))


def detector_card(
    run_folder: str | Path, config: CfgNode, classes: Sequence[str], file: str, form: str, found: Difference
) -> str:
    """The card of a detector.

    Args:
        run_folder: reads its ``result.json``, where there is one, and the config as it was trained.
        config: of the detector.
        classes: names in the order of the labels.
        file: name of the exported file.
        form: ``onnx`` or ``torch-export``.
        found: how far the exported detector is from the detector.
    """
    folder = RunFolder(run_folder)
    result = folder.result() if folder.done else {}
    trained, tested = _sets(config, "TRAIN"), _sets(config, "TEST")
    arch = config.MODEL.TIMM.ARCH
    name = f"{folder.path.resolve().name}-{arch}"
    metadata = _metadata(
        name, LIBRARIES[form], "object-detection", ["faster-rcnn"], _detector_results(result, config, tested)
    )
    size = f"shortest side {config.INPUT.MIN_SIZE_TEST}, longest at most {config.INPUT.MAX_SIZE_TEST} pixels"
    facts = {
        "architecture": f"Faster R-CNN{' with FPN' if 'fpn' in config.MODEL.BACKBONE.NAME else ''} on {arch}",
        "classes": f"{len(classes)}: {', '.join(classes)}",
        "parameters": _count(result.get("params")),
        "backbone's weights": _origin(folder.path),
        "transfer while the detector was trained": _method(result.get("method", ""), "none"),
        "trained on": ", ".join(trained) or "not known",
        "steps": f"{result['steps']} of {config.SOLVER.IMS_PER_BATCH} images" if "steps" in result else "not known",
        "seed": _known(result.get("seed")),
        "images": f"RGB, {size}",
        "against PyTorch": found.line(),
    }
    sizes = ", ".join(map(str, config.INPUT.MIN_SIZE_TRAIN))
    limits = [
        f"It finds these {len(classes)} classes; all else is taken for one of them or for background.",
        f"Its scores are not calibrated; those below {config.MODEL.ROI_HEADS.SCORE_THRESH_TEST:g} are not given out.",
        f"It was trained with a shortest side of {sizes} pixels and measured with {config.INPUT.MIN_SIZE_TEST}.",
    ]
    if form == "torch-export":
        limits.append("Both sides of the resized image must be longer than the network's largest stride (64 with FPN).")
    if result.get("map") is None:
        limits.append("Its accuracy was not measured.")
    else:
        limits.append(f"Its accuracy was measured on {', '.join(tested)} alone, with one seed.")
    use = (ONNX_USE if form == "onnx" else PROGRAM_USE).format(
        file=file, min_size=config.INPUT.MIN_SIZE_TEST, max_size=config.INPUT.MAX_SIZE_TEST, classes=list(classes)
    )
    return _text(metadata, name, facts, _accuracy(result, tested), use, limits)


def backbone_card(card: Card, name: str, form: str, agreement: str, use: str) -> str:
    """The card of a backbone.

    Args:
        card: of its backbone file.
        name: of the model.
        form: ``timm``, ``torchvision`` or ``detectron2``.
        agreement: how far the exported network is from the original, for people.
        use: code that shows how to load it.
    """
    data = str(card.data.get("name", "")) or "not known"
    results = []
    for key, metric in (("top1", "accuracy"), ("top5", "top_5_accuracy")):
        value = getattr(card, key)
        if value is not None:
            results.append(EvalResult("image-classification", data, data, metric, value, dataset_split="validation"))
    metadata = _metadata(name, LIBRARIES.get(form, form), "image-classification", ["backbone"], results)
    pixels = card.input
    facts = {
        "architecture": f"{card.arch} (timm){_kwargs(card.arch_kwargs)}",
        "classes": str(card.num_classes),
        "parameters": _count(card.params),
        "method": _method(card.method, "labels only"),
        "loss weights": ", ".join(f"{term} {weight:g}" for term, weight in card.weights.items()) or "none",
        "teacher": _teacher(card.teacher),
        "trained on": f"{data}, {_count(card.data.get('images'))} images",
        "steps": _known(card.steps),
        "seed": _known(card.seed),
        "images": f"{pixels['channel_order']}, {_known(pixels.get('size'))} pixels, mean {_numbers(pixels['mean'])}, "
        f"std {_numbers(pixels['std'])} on the 0..1 scale",
        "against the original": agreement,
    }
    accuracy = [f"| {label} | {getattr(card, key):.4f} |" for key, label in TOPS if getattr(card, key) is not None]
    limits = [
        "It is made to start a detector or another network from; as a classifier it knows its training classes alone.",
        f"Its accuracy was measured on the validation split of {data} alone, with one seed."
        if accuracy
        else "Its accuracy was not measured.",
        "Pixels must be scaled as above: other means, other results.",
    ]
    return _text(metadata, name, facts, _table(accuracy, "validation"), use, limits)


def _metadata(name: str, library: str, task: str, tags: Iterable[str], results: list[EvalResult]) -> str:
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[*tags, "knowledge-distillation", "nst_det"],
        # without results the hub wants neither
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _detector_results(result: Mapping[str, Any], config: CfgNode, tested: Sequence[str]) -> list[EvalResult]:
    named = {"map": "mAP, IoU 0.5, 11-point", "map_area": "mAP, IoU 0.5, area"}
    return [
        EvalResult(
            task_type="object-detection",
            dataset_type="-".join(config.DATASETS.TEST),
            dataset_name=", ".join(tested),
            metric_type="mean_average_precision",
            metric_name=label,
            metric_value=result[key],
        )
        for key, label in named.items()
        if result.get(key) is not None
    ]


def _text(metadata: str, name: str, facts: Mapping[str, str], accuracy: str, use: str, limits: Sequence[str]) -> str:
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    points = "\n".join(f"- {line}" for line in limits)
    return (
        f"{metadata}\n# {name}\n\nWritten by nst_det from the run's own files.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"## Accuracy\n\n{accuracy}\n\n## Use\n\n{use}\n## Limits\n\n{points}\n\n"
        f"## Source\n\nNeuron selectivity transfer: Huang & Wang 2017, <{PAPER}>.\n"
    )


def _accuracy(result: Mapping[str, Any], tested: Sequence[str]) -> str:
    labels = {"map": "mAP, IoU 0.5 (11-point)", "map_area": "mAP, IoU 0.5 (area)"}
    rows = [f"| {label} | {result[key]:.4f} |" for key, label in labels.items() if result.get(key) is not None]
    coco = result.get("coco") or {}
    rows += [f"| COCO {key} | {value:.4f} |" for key, value in coco.items() if value is not None]
    per_class = result.get("per_class") or {}
    rows += [f"| AP of {name} (11-point) | {value:.4f} |" for name, value in per_class.items() if value is not None]
    return _table(rows, ", ".join(tested))


def _table(rows: Sequence[str], where: str) -> str:
    return "\n".join([f"| | {_cell(where)} |", "|---|---:|", *rows]) if rows else "Not measured."


def _sets(config: CfgNode, part: str) -> list[str]:
    """Names of data sets with their folder's and list's, without the path to it."""
    voc = config.DATASETS.VOC
    return [f"{name} ({Path(voc[name].ROOT).name}, {voc[name].SPLIT})" for name in config.DATASETS[part]]


def _origin(folder: Path) -> str:
    """Where the detector's weights began."""
    config = run_config(folder)
    weights = config.MODEL.WEIGHTS
    if not weights:
        return "timm's published ones" if config.MODEL.TIMM.PRETRAINED else "random"
    shown = weights if "://" in weights else Path(weights).name
    try:
        card = load_card(weights)
    except UserError:
        # a whole detector has no card, and a backbone may be gone since
        return shown
    top1 = "" if card.top1 is None else f", top-1 {card.top1:.4f}"
    return f"{shown}: method {_method(card.method, 'unknown')}, on {card.data.get('name', 'unknown data')}{top1}"


def _method(word: str, none: str) -> str:
    return none if word in ("", "ce") else f"`{word}`"


def _teacher(teacher: Mapping[str, Any]) -> str:
    if not teacher:
        return "none"
    top1 = teacher.get("top1")
    return f"{teacher.get('arch') or teacher.get('name')}" + ("" if top1 is None else f", top-1 {top1:.4f}")


def _kwargs(kwargs: Mapping[str, Any]) -> str:
    return "".join(f", {key}={value!r}" for key, value in kwargs.items())


def _count(value: Any) -> str:
    return "not known" if value is None else f"{value:,}"


def _known(value: Any) -> str:
    return "not known" if value is None else str(value)


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
