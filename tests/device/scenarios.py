"""What is run on the pretended GPUs, in a process of its own: ``python scenarios.py GROUP FILE`` writes what was found.

FILE is JSON: a dict a scenario with ``error`` (a traceback, or ""), ``counted`` (whether it counts), ``launches`` and
``waits`` (number by place).
"""

import io
import json
import math
import os
import pkgutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from nst_det.cli import main
from nst_det.data.synthetic import CLASSIFICATION, DETECTION, GenerateSettings, generate_data
from nst_det.detection.config import load_detect_config
from nst_det.detection.pipeline import train_detector
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.engine import nan_guard
from nst_det.engine.nan_guard import NonFiniteGuard
from nst_det.engine.train_state import OptimizedState
from nst_det.losses import ModelOutputs, build_transfer, terms
from tests.helpers.pretended_cuda import Counts, pretended

CHECKOUT = Path(__file__).resolve().parents[2]
Words = dict[str, Any]
# (function, which of its calls)
Moment = tuple[str, int]

FOUND: dict[str, dict[str, Any]] = {}
ALL: tuple[Moment, ...] = ()
# a rate that makes the second step's loss non-finite
BREAKS = {"SOLVER.BASE_LR": 1e30, "SOLVER.MAX_ITER": 2, "SOLVER.NON_FINITE.POLICY": "skip"}
WORKERS = {"SOLVER.MAX_ITER": 1, "DATALOADER.NUM_WORKERS": 2}
# nearly all that a step can do
EVERY = {
    "SOLVER.MAX_ITER": 2,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.EMA_DECAY": 0.9,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 1,
}
EVERY_DET = {**EVERY, "MODEL.DEVICE": "cuda:1", "DATASETS.VAL_FRACTION": 0.3}
# the third step of four reads the one before, as most do: in the first terms are measured, the last is saved
STAGE_ONE_STEP = tuple(("nst_det.distillation.loop:one_step", call) for call in (3, 4))
MEASURE, RECORD = "nst_det.distillation.validation:measure", "nst_det.distillation.trainer:StudentTrainer.record"
STAGE_ONE_EVALUATION = ((MEASURE, 1), (RECORD, 1))
STAGE_TWO_STEP = tuple(("nst_det.detection.trainer:Trainer.run_step", call) for call in (3, 4))
STAGE_TWO_EVALUATION = (("nst_det.detection.pipeline:detect", 1), ("nst_det.detection.pipeline:score", 1))
DETECTRON2_STEP = tuple(("nst_det.detectron2.trainer:DistillTrainer.run_step", call) for call in (2, 3))


class Stopped(Exception):
    """A run that is to be resumed."""


@contextmanager
def scenario(name: str, counted: tuple[Moment, ...] | None = None, device: str = "") -> Iterator[None]:
    """Note what a block raises, and launches and waits between the ``counted`` moments (ALL, or None for none).

    ``device`` is the only one about which this package may ask.
    """
    pretended.questions.clear()
    counts, error = Counts(), ""
    switches = dict(zip(counted or (), (partial(count_in, counts), partial(count_in, None))))
    for path, _ in switches:
        # one that is gone ends all, and is named
        pkgutil.resolve_name(path)
    count_in(counts if counted == ALL else None)
    try:
        with at_calls(switches):
            yield
        if device:
            check_questions(torch.device(device))
    except BaseException:
        error = traceback.format_exc()
    count_in(None)
    FOUND[name] = {"error": error, "counted": counted is not None, **vars(counts)}


def check_questions(device: torch.device) -> None:
    """The block asked about no other device; names and random states are those of all."""
    asked = [one for one in pretended.questions if one[0] not in ("get_device_name", "get_rng_state")]
    others = {" ".join(map(str, one)) for one in asked if one[1] != device.index and one[2].startswith("nst_det")}
    assert not others, f"asked about another device than {device}: {others}"


def count_in(counts: Counts | None) -> None:
    pretended.counts = counts


@contextmanager
def at_calls(actions: dict[Moment, Callable[[], None]]) -> Iterator[None]:
    """Do something whenever one of these moments has come; all of them must come."""
    calls: Counter[str] = Counter()

    def watched(path: str) -> Callable[..., Any]:
        function = pkgutil.resolve_name(path)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[path] += 1
            actions.get((path, calls[path]), lambda: None)()
            return function(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for path in {path for path, _ in actions}:
            patches.enter_context(mock.patch(path.replace(":", "."), watched(path)))
        yield
        assert all(calls[path] >= call for path, call in actions), f"{list(actions)} did not all come: {calls}"


@contextmanager
def stopped_at(moment: Moment) -> Iterator[None]:
    """The block's run ends at this moment."""

    def stop() -> None:
        raise Stopped

    with suppress(Stopped), at_calls({moment: stop}):
        yield


def nst_det(*words: Any) -> None:
    """Run a command line that must end well."""
    try:
        with redirect_stderr(io.StringIO()) as errors:
            main([str(word) for word in words])
    except SystemExit as left:
        if left.code:
            raise AssertionError(f"nst-det {words[0]} ended with {left.code}: {errors.getvalue()}") from left


class Folder:
    """A folder with generated data, and the command lines on it."""

    def __init__(self, path: Path) -> None:
        classification = {"classification_images": 24, "classification_val_images": 12, "classification_classes": 3}
        detection = {"detection_images": 12, "detection_test_images": 1, "detection_classes": 3}
        self.path = path
        self.data = generate_data(path / "data", GenerateSettings(**classification, **detection), workers=1)
        os.environ["NST_DET_BACKBONES"] = str(path / "backbones")

    def distill(self, output: str, **values: Any) -> None:
        """Four steps of stage one with six images of 64 pixels."""
        values = {
            "NAME": output,
            "OUTPUT_DIR": self.path / output,
            "REGISTRY": self.path / "backbones",
            "DATA.ROOT": self.data / CLASSIFICATION,
            "DATA.IMAGE_SIZE": 64,
            "STUDENT.ARCH": "nst_resnet10_w32",
            "TEACHER.ARCH": "nst_resnet10_w32",
            "TEACHER.SOLVER": {"MAX_ITER": 1},
            "TRANSFER.LEVELS": ["res5"],
            "SOLVER.MAX_ITER": 4,
            "SOLVER.IMS_PER_BATCH": 6,
            "LOG_PERIOD": 100,
            **values,
        }
        distill(load_distill_config(None, [str(word) for pair in values.items() for word in pair]))

    def detect(self, output: str, **values: Any) -> None:
        """Four steps of stage two with two images of 64 pixels."""
        voc = {"ROOT": str(self.data / DETECTION)}
        tree: Words = {
            "_BASE_": str(CHECKOUT / "configs" / "detect" / "base_rcnn_fpn.yaml"),
            "ENGINE": "torchvision",
            "OUTPUT_DIR": str(self.path / output),
            "MODEL": {
                "BACKBONE": {"FREEZE_AT": 0},
                "TIMM": {"ARCH": "nst_resnet10_w32", "NORM": "BN"},
                "FPN": {"OUT_CHANNELS": 16},
                "RPN": {"PRE_NMS_TOPK_TRAIN": 200, "POST_NMS_TOPK_TRAIN": 100, "BATCH_SIZE_PER_IMAGE": 32},
                "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 32},
                "ROI_BOX_HEAD": {"FC_DIM": 32},
            },
            "DATASETS": {
                "VOC": {"own_train": {**voc, "SPLIT": "trainval"}, "own_test": {**voc, "SPLIT": "test"}},
                "TRAIN": ["own_train"],
                "TEST": ["own_test"],
            },
            "DATALOADER": {"NUM_WORKERS": 0},
            "INPUT": {"MIN_SIZE_TRAIN": [64], "MAX_SIZE_TRAIN": 64, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 64},
            "SOLVER": {"MAX_ITER": 4, "IMS_PER_BATCH": 2, "BASE_LR": 0.001, "STEPS": [], "AMP": {"ENABLED": True}},
            "SEED": 0,
        }
        for key, value in values.items():
            *above, last = key.split(".")
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = value
        # JSON is YAML
        (self.path / f"{output}.yaml").write_text(json.dumps(tree))
        if tree["ENGINE"] == "torchvision":
            train_detector(load_detect_config(self.path / f"{output}.yaml"))
        else:
            nst_det("train-det", "--config-file", self.path / f"{output}.yaml")

    def taught(self, method: str, teacher: str) -> Words:
        """Keys of a student of a teacher detector that was trained here."""
        return {
            "METHOD": method,
            "TRANSFER.LEVELS": ["p2", "p3", "p4", "p5"],
            "TEACHER.CONFIG_FILE": str(self.path / f"{teacher}.yaml"),
            "TEACHER.WEIGHTS": str(self.path / teacher / "model.safetensors"),
        }


@contextmanager
def infinite_gradient(at: int) -> Iterator[None]:
    """The gradient of a step is infinite whenever that step is made."""
    keep, norm, now = NonFiniteGuard.keep_buffers, nan_guard.gradient_norm, {"step": 0}

    def kept(self: NonFiniteGuard, step: int) -> None:
        now["step"] = step
        keep(self, step)

    def broken(parameters: Any) -> torch.Tensor:
        if now["step"] == at:
            parameters[0].grad.fill_(math.inf)
        return norm(parameters)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(NonFiniteGuard, "keep_buffers", kept))
        for stage in ("distillation", "detection"):
            patches.enter_context(mock.patch(f"nst_det.{stage}.trainer.gradient_norm", broken))
        yield


def faults(folder: Folder, run: Callable[..., None], weights: str, **values: Any) -> None:
    """A step that is not finite, read a step later, ends as one whose end is waited for."""
    values |= {"SOLVER.NON_FINITE.POLICY": "skip", "SOLVER.EMA_DECAY": 0.9}
    with infinite_gradient(1):
        run("later", **values)
        with mock.patch.object(OptimizedState, "waits", True):
            run("waited", **values)
    for name in ("later", "waited"):
        (dump,) = (folder.path / name).rglob("nonfinite/*.pt")
        assert dump.name == "step-00000001.pt"
    later, waited = (load_file(folder.path / weights.format(name)) for name in ("later", "waited"))
    assert all(torch.equal(later[name], waited[name]) for name in waited)


def losses() -> None:
    """Every term by itself, on maps of two levels, logits and embeddings of six images."""
    widths = {"res3": 16, "res4": 32}

    def outputs(widths: dict[str, int], learns: bool) -> ModelOutputs:
        shapes = [(6, 5), (6, 32), *((6, width, 8, 8) for width in widths.values())]
        logits, embedding, *maps = (torch.rand(shape, device="cuda:1", requires_grad=learns) for shape in shapes)
        labels, boxes = torch.zeros(6, dtype=torch.int64, device="cuda:1"), [torch.rand(2, 4, device="cuda:1")] * 6
        return ModelOutputs(logits, dict(zip(widths, maps)), embedding, labels, boxes)

    for term in terms():
        # PKD has no adapter
        theirs = widths if term == "pkd" else {"res3": 24, "res4": 48}
        vectors = {"num_classes": 5, "student_embedding": 32, "teacher_embedding": 32}
        maps = {"levels": list(widths), "student_channels": widths, "teacher_channels": theirs}
        loss = build_transfer(term, **maps, **vectors).to("cuda:1")
        student, teacher = outputs(widths, learns=True), outputs(theirs, learns=False)
        with scenario(f"loss {term}", ALL, "cuda:1"):
            sum(loss(student, teacher).values()).backward()


def stage_one(folder: Folder) -> None:
    losses()
    deep = {"STUDENT.ARCH": "resnet18", "TEACHER.ARCH": "resnet50"}
    with scenario("stage one, teacher"):
        folder.distill("deep", METHODS=[], **deep)
    for method in ("ce", "kd+nst-poly", "nst-gaussian"):
        with scenario(f"stage one, {method}", STAGE_ONE_STEP):
            folder.distill("deep", METHODS=[method], **deep)
    with scenario("stage one, evaluation", STAGE_ONE_EVALUATION):
        folder.distill("evaluated", METHODS=["ce"])
    clipped = {"SOLVER.CLIP_GRADIENTS": {"ENABLED": True, "CLIP_VALUE": 1.0}, "SOLVER.ACCUMULATE": 2}
    every = {**EVERY, **clipped, "METHODS": ["ce", without_boxes()], "LOG_PERIOD": 1}
    with scenario("stage one, every term, resumed"):
        with stopped_at(("nst_det.distillation.loop:one_step", 3)):
            folder.distill("resumed", **every)
        folder.distill("resumed", **every)
    with scenario("stage one, a gradient that is not finite"):
        faults(folder, folder.distill, "backbones/{}-ce-s0.safetensors", METHODS=["ce"])
    with scenario("stage one, fp16"):
        folder.distill("fp16", **{"METHODS": ["kd+nst-poly"], "SOLVER.AMP.DTYPE": "fp16", "SOLVER.EMA_DECAY": 0.9})
    with scenario("stage one, cached teacher"):
        cache = {"CACHE.DIR": folder.path / "cache", "CACHE.VIEWS": 1}
        folder.distill("cached", **{"METHODS": ["kd+nst-poly"], "SOLVER.MAX_ITER": 1, **cache})
    with scenario("stage one, replay"):
        folder.distill("broken", **{"METHODS": ["ce"], **BREAKS})
        nst_det("replay", *(folder.path / "broken").rglob("step-00000001.pt"))


def stage_two(folder: Folder) -> None:
    r18, r50 = {"MODEL.TIMM.ARCH": "resnet18"}, {"MODEL.TIMM.ARCH": "resnet50"}
    with scenario("stage two, on the CPU", ALL, "cpu"):
        folder.detect("cpu", **{"MODEL.DEVICE": "cpu"})
    with scenario("stage two, teacher"):
        folder.detect("teacher", **r50, **{"SOLVER.MAX_ITER": 1, "DATASETS.TEST": []})
    with scenario("stage two, ce, 16 images", STAGE_TWO_STEP):
        folder.detect("batch", **r18, **{"SOLVER.IMS_PER_BATCH": 16, "DATASETS.TEST": []})
    with scenario("stage two, ce", STAGE_TWO_STEP):
        folder.detect("plain", **r18, **{"DATASETS.TEST": []})
    for method in ("nst-poly", "cwd"):
        with scenario(f"stage two, {method}@det", STAGE_TWO_STEP):
            folder.detect(method, **r18, **{"DATASETS.TEST": []}, **folder.taught(method, "teacher"))
    with scenario("stage two, evaluation", STAGE_TWO_EVALUATION, "cuda:1"):
        folder.detect("evaluated", **{"MODEL.DEVICE": "cuda:1"})
    clip = {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 1.0}
    # terms that don't compare maps learn at the box heads
    every = {**EVERY_DET, **folder.taught("+".join(terms()), "evaluated")}
    every |= {"SOLVER.CLIP_GRADIENTS": clip, "SOLVER.ACCUMULATE": 2}
    with scenario("stage two, every term, resumed", device="cuda:1"):
        with stopped_at(("nst_det.detection.trainer:Trainer.run_step", 2)):
            folder.detect("resumed", **every)
        folder.detect("resumed", **every)
    with scenario("stage two, a gradient that is not finite"):
        faults(folder, folder.detect, "{}/model.safetensors", **{"DATASETS.TEST": []})
    with scenario("stage two, replay"):
        folder.detect("broken", **BREAKS)
        nst_det("replay", *(folder.path / "broken").rglob("step-00000001.pt"))


def without_boxes() -> str:
    """All terms of stage one, which has no boxes."""
    return "+".join(name for name, spec in terms().items() if spec.truth != "boxes")


def detectron2(folder: Folder) -> None:
    engine = {"ENGINE": "detectron2"}
    with scenario("detectron2, teacher"):
        folder.detect("teacher", **engine, **{"SOLVER.MAX_ITER": 1, "DATASETS.TEST": []})
    with scenario("detectron2, ce", DETECTRON2_STEP):
        folder.detect("plain", **engine, **{"DATASETS.TEST": []})
    for method in ("nst-poly", "cwd"):
        with scenario(f"detectron2, {method}@det", DETECTRON2_STEP):
            folder.detect(method, **engine, **{"DATASETS.TEST": []}, **folder.taught(method, "teacher"))
    every = {**EVERY_DET, **folder.taught("+".join(terms()), "teacher")}
    with scenario("detectron2, every term, resumed", device="cuda:1"):
        with stopped_at(("nst_det.detectron2.trainer:DistillTrainer.run_step", 2)):
            folder.detect("resumed", **engine, **every)
        folder.detect("resumed", **engine, **every)
    with scenario("detectron2, --eval-only"):
        nst_det("train-det", "--config-file", folder.path / "resumed.yaml", "--eval-only", "--resume")
    with scenario("detectron2, workers"):
        folder.detect("forked", **engine, **WORKERS, **{"DATASETS.TEST": []})
    with scenario("detectron2, replay"):
        folder.detect("broken", **engine, **BREAKS, **{"SOLVER.AMP": {"ENABLED": False}})
        nst_det("replay", *(folder.path / "broken").rglob("step-00000001.pt"))


def commands(folder: Folder) -> None:
    """Every command that computes on a device, after a short run of each stage on the second GPU."""
    with scenario("runs for the commands"):
        folder.distill("distilled", METHODS=["ce", "kd"])
        folder.detect("run", **{"MODEL.DEVICE": "cuda:1", "INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 96})
    run, config = folder.path / "run", folder.path / "run.yaml"
    backbones = [folder.path / "backbones" / f"distilled-{method}-s0.safetensors" for method in ("ce", "kd")]
    weights = [word for file in backbones for word in ("--weights", file)]
    image = next(folder.data.joinpath(DETECTION).rglob("*.jpg"))
    second, fast = ("--device", "cuda:1"), ("--batch", 1, "--repeats", 1, "--size", 64)
    out = folder.path / "out"
    words: dict[str, tuple[Any, ...]] = {
        "benchmark --arch": ("benchmark", "--arch", "nst_resnet10_w32", *fast, *second),
        "benchmark --weights": ("benchmark", "--weights", backbones[0], *fast, *second),
        "benchmark --run": ("benchmark", "--run", run, *fast, *second),
        "benchmark --config-file": ("benchmark", "--config-file", config, *fast, *second),
        "predict": ("predict", image, "--run", run, "--output", out / "predicted", *second),
        "predict by default": ("predict", image, "--run", run, "--output", out / "here"),
        "train-det --eval-only": ("train-det", "--config-file", config, "--eval-only", "--resume"),
        "export of a backbone": ("export", "--format", "timm", "--weights", backbones[0], "--output", out / "timm"),
        "look": ("look", *weights, "--image", image, "--output", out / "look.html"),
        "backbones --check": ("backbones", "--check", backbones[0]),
        "init": ("init", folder.path / "project", "--voc", folder.data / DETECTION),
        "doctor": ("doctor",),
    }
    for name, line in words.items():
        with scenario(name, device="cuda:1" if "cuda:1" in line else ""):
            nst_det(*line)
    with scenario("export"), stopped_at(("nst_det.exporting.formats:trace", 1)):
        # the comparison of detector and graph; tracing takes long
        nst_det("export", "--format", "torch-export", "--run", run, "--output", out / "detector.pt2")


def workers(folder: Folder) -> None:
    """Loader processes that are forked after CUDA was begun."""
    augment = {"DATA.AUGMENT.CROP_AREA": [0.3, 1.0], "DATA.AUGMENT.COLOR_JITTER": [0.4, 0.4, 0.4, 0.1]}
    with scenario("stage one, workers"):
        folder.distill("cropped", METHODS=["ce"], **WORKERS, **augment)
    with scenario("stage two, workers"):
        folder.detect("detected", **WORKERS)


GROUPS = {
    "stage one": stage_one,
    "stage two": stage_two,
    "detectron2": detectron2,
    "commands": commands,
    "workers": workers,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        folder = Folder(Path(path))
        pretended.begin()
        GROUPS[sys.argv[1]](folder)
    Path(sys.argv[2]).write_text(json.dumps(FOUND))
