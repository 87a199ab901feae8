"""Model cards: Markdown with the metadata that the Hugging Face hub reads, from what a run wrote about itself.

The text is in ``templates/``.  It says nothing that the run, or the backbone's card, doesn't say: what was not measured
is called so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from nst_det.detection.predict import run_config
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.models import Card, load_card

LIBRARIES = {"onnx": "onnx", "torch-export": "pytorch", "timm": "timm", "torchvision": "torchvision"}


def detector_card(
    run_folder: str | Path, config: CfgNode, classes: Sequence[str], file: str, form: str, agreement: str
) -> str:
    """Return the card of a detector, exported as ``file``.

    ``form`` is ``onnx`` or ``torch-export``; ``agreement`` says how near the file is to the detector.
    """
    folder = RunFolder(run_folder)
    result = folder.result() if folder.done else {}
    measured_on = ", ".join(_data_sets(config, "TEST"))
    arch = config.MODEL.TIMM.ARCH
    name = f"{folder.path.resolve().name}-{arch}"
    means = _measured({"mAP, IoU 0.5 (11-point)": result.get("map"), "mAP, IoU 0.5 (area)": result.get("map_area")})
    others = {f"COCO {key}": value for key, value in (result.get("coco") or {}).items()}
    others |= {f"AP of {key} (11-point)": value for key, value in (result.get("per_class") or {}).items()}
    metrics = [
        EvalResult(
            task_type="object-detection",
            dataset_type="-".join(config.DATASETS.TEST),
            dataset_name=measured_on,
            metric_type="mean_average_precision",
            metric_name=label,
            metric_value=value,
        )
        for label, value in means.items()
    ]
    return _render(
        "detector.md",
        _metadata(name, LIBRARIES[form], "object-detection", "faster-rcnn", metrics),
        name=name,
        form=form,
        file=file,
        agreement=agreement,
        config=config,
        arch=arch,
        classes=list(classes),
        result=result,
        origin=_origin(folder.path),
        trained_on=", ".join(_data_sets(config, "TRAIN")) or "not known",
        measured_on=measured_on,
        accuracy={**means, **_measured(others)},
    )


def backbone_card(card: Card, name: str, form: str, agreement: str, file: str, own_arch: bool = False) -> str:
    """Return the card of a backbone, exported as ``file``.

    ``form`` is ``timm``, ``torchvision`` or ``detectron2``; ``own_arch``: timm needs this package to build it.
    """
    data = str(card.data.get("name", "")) or "not known"
    metrics = [
        EvalResult("image-classification", data, data, metric, value, dataset_split="validation")
        for metric, value in _measured({"accuracy": card.top1, "top_5_accuracy": card.top5}).items()
    ]
    return _render(
        "backbone.md",
        _metadata(name, LIBRARIES.get(form, form), "image-classification", "backbone", metrics),
        name=name,
        form=form,
        file=file,
        agreement=agreement,
        card=card,
        own_arch=own_arch,
        data=data,
        measured_on="validation",
        accuracy=_measured({"top-1": card.top1, "top-5": card.top5}),
    )


def _render(template: str, metadata: ModelCardData, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("nst_det.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(cell=_cell, known=_known, method=_method, numbers=_numbers, thousands=_thousands)
    return environment.get_template(template).render(metadata=metadata.to_yaml(), **values)


def _metadata(name: str, library: str, task: str, tag: str, metrics: list[EvalResult]) -> ModelCardData:
    return ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=[tag, "knowledge-distillation", "nst_det"],
        # without results the hub wants neither
        model_name=name if metrics else None,
        eval_results=metrics or None,
    )


def _measured(values: Mapping[str, float | None]) -> dict[str, float]:
    return {label: value for label, value in values.items() if value is not None}


def _data_sets(config: CfgNode, part: str) -> list[str]:
    """Return the names of data sets with their folder's and list's, without the path to it."""
    voc = config.DATASETS.VOC
    return [f"{name} ({Path(voc[name].ROOT).name}, {voc[name].SPLIT})" for name in config.DATASETS[part]]


def _origin(folder: Path) -> str:
    """Return where the detector's weights began."""
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


def _method(method: str, none: str) -> str:
    return none if method in ("", "ce") else f"`{method}`"


def _known(value: Any) -> str:
    return "not known" if value is None else str(value)


def _thousands(value: Any) -> str:
    return "not known" if value is None else f"{value:,}"


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _cell(text: str) -> str:
    """Return text that stays within a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
