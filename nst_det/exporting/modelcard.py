"""Model cards: Markdown with the metadata that the Hugging Face hub reads, from what a run wrote about itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from nst_det.detection.predict import run_config
from nst_det.engine.run_dir import RunFolder
from nst_det.errors import UserError
from nst_det.evaluation.thresholds import DEFAULT, SCORES, read_thresholds
from nst_det.exporting.runtime import CALL, KEY, Contract
from nst_det.models import Card, load_card

# that read a form of another name
LIBRARIES = {"torch-export": "pytorch"}
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch-export": "torch and torchvision"}


def detector_script(file: str, form: str) -> str:
    """Return a program of 40 lines that runs an exported detector by numpy, Pillow and the runtime alone."""
    template = _environment().get_template("detect.py.jinja")
    return template.render(file=file, form=form, key=KEY, default_threshold=DEFAULT)


def detector_card(
    run_folder: str | Path,
    config: CfgNode,
    contract: Contract,
    file: str,
    form: str,
    agreement: str,
    measured: str = "",
) -> str:
    """Return the card of a detector, exported as ``file`` in the form ``form``; ``measured`` is a Markdown table."""
    folder, classes = RunFolder(run_folder), contract.classes
    result = folder.result() if folder.done else {}
    measured_on = ", ".join(_data_sets(config, "TEST"))
    name = f"{folder.path.resolve().name}-{config.MODEL.TIMM.ARCH}"
    means = _measured({"mAP, IoU 0.5 (11-point)": result.get("map"), "mAP, IoU 0.5 (area)": result.get("map_area")})
    others = {f"COCO {key}": value for key, value in (result.get("coco") or {}).items()}
    others |= {f"AP of {key} (11-point)": value for key, value in (result.get("per_class") or {}).items()}
    task, data = "object-detection", "-".join(config.DATASETS.TEST)
    return _render(
        "detector.md",
        form,
        (task, "faster-rcnn"),
        [
            EvalResult(task, data, measured_on, "mean_average_precision", value, metric_name=label)
            for label, value in means.items()
        ],
        name=name,
        file=file,
        agreement=agreement,
        config=config,
        arch=config.MODEL.TIMM.ARCH,
        classes=list(classes),
        contract=contract,
        measured=measured.strip(),
        call=CALL,
        key=KEY,
        runtime=RUNTIMES[form],
        script=detector_script(file, form).rstrip(),
        default_threshold=DEFAULT,
        thresholds=read_thresholds(folder.path),
        f1_at=[(score, index) for index, score in enumerate(SCORES.tolist()) if index % 10 == 5],
        result=result,
        origin=_origin(folder.path),
        trained_on=", ".join(_data_sets(config, "TRAIN")) or "not known",
        measured_on=measured_on,
        accuracy={**means, **_measured(others)},
    )


def backbone_card(card: Card, name: str, form: str, agreement: str, file: str, own_arch: bool = False) -> str:
    """Return the card of a backbone, exported as ``file``; with ``own_arch`` timm needs this package to build it."""
    task, data = "image-classification", str(card.data.get("name", "")) or "not known"
    return _render(
        "backbone.md",
        form,
        (task, "backbone"),
        [
            EvalResult(task, data, data, metric, value, dataset_split="validation")
            for metric, value in _measured({"accuracy": card.top1, "top_5_accuracy": card.top5}).items()
        ],
        name=name,
        file=file,
        agreement=agreement,
        card=card,
        own_arch=own_arch,
        data=data,
        measured_on="validation",
        accuracy=_measured({"top-1": card.top1, "top-5": card.top5, **card.measured}),
    )


def detectron2_config(**values: Any) -> str:
    """Return the YAML with all keys of Detectron2 that the weights of a ResNet need."""
    return f"{_environment().get_template('resnet_fpn.yaml').render(values)}\n"


def _render(
    template: str, form: str, task_and_tag: tuple[str, str], metrics: list[EvalResult], name: str, **values: Any
) -> str:
    metadata = ModelCardData(
        library_name=LIBRARIES.get(form, form),
        pipeline_tag=task_and_tag[0],
        tags=[task_and_tag[1], "knowledge-distillation", "nst_det"],
        # without results the hub wants neither
        model_name=name if metrics else None,
        eval_results=metrics or None,
    )
    return _environment().get_template(template).render(metadata=metadata.to_yaml(), form=form, name=name, **values)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nst_det.exporting"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        cell=lambda text: " ".join(text.split()).replace("|", "\\|"),
        known=lambda value: "not known" if value is None else str(value),
        method=_method,
        numbers=lambda values: "(" + ", ".join(f"{value:g}" for value in values) + ")",
        thousands=lambda value: "not known" if value is None else f"{value:,}",
    )
    return environment


def _measured(values: Mapping[str, float | None]) -> dict[str, float]:
    return {label: value for label, value in values.items() if value is not None}


def _data_sets(config: CfgNode, part: str) -> list[str]:
    """Return the names of data sets; of VOC folders with their folder's and list's, without the path to it."""
    voc = config.DATASETS.VOC
    return [
        f"{name} ({Path(voc[name].ROOT).name}, {voc[name].SPLIT})" if name in voc else name
        for name in config.DATASETS[part]
    ]


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
