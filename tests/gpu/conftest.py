"""A few steps of both stages on textured shapes, on a GPU or on the CPU."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nst_det.cli import main
from nst_det.data.synthetic import CLASSIFICATION, GenerateSettings, generate_data
from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.engine.metrics import read_metrics

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGE_ONE = {
    "DATALOADER.NUM_WORKERS": 0,
    "TEACHER.EXPECTED_TOP1": 0,
    "TEACHER.SOLVER": {"MAX_ITER": 3, "BASE_LR": 0.001},
    "TEST.EVAL_PERIOD": 0,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "LOG_PERIOD": 1,
}
STAGE_TWO = {
    "MODEL.FPN.OUT_CHANNELS": 32,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.BASE_LR": 0.0005,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "INPUT.MIN_SIZE_TRAIN": [96],
    "INPUT.MIN_SIZE_TEST": 96,
}


@pytest.fixture(scope="session", autouse=True)
def gpu_device():
    """``cuda``; with NST_DET_GPU_TESTS_ON_CPU=1 ``cpu``, which tries the tests themselves."""
    if os.environ.get("NST_DET_GPU_TESTS_ON_CPU") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU to be seen; run pytest -m gpu on a machine that has one")
    return "cuda"


@pytest.fixture(autouse=True)
def _float32_convolutions(monkeypatch):
    """Convolutions in float32 are not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def computing_on(device):
    """The block computes there: a GPU's memory is used in it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield
    assert device == "cpu" or torch.cuda.max_memory_allocated() > before + 2**20


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """Textured shapes: an image folder of 4 classes and a VOC folder of 3."""
    classification = {"classification_images": 48, "classification_val_images": 8, "classification_classes": 4}
    detection = {"detection_images": 12, "detection_test_images": 4, "detection_classes": 3}
    settings = GenerateSettings(**classification, **detection)
    return generate_data(tmp_path_factory.mktemp("generated") / "data", settings, workers=1)


@pytest.fixture(autouse=True)
def _named_data(generated, monkeypatch):
    monkeypatch.setenv("NST_DET_SHAPES", str(generated))


def words_of(*layers):
    merged = {key: value for layer in layers for key, value in layer.items()}
    return [str(word) for pair in merged.items() for word in pair]


@pytest.fixture(scope="session")
def stage_one_config(generated):
    """``stage_one_config(folder, keys)``: the config of a few steps at 64 pixels."""

    def config(folder, keys=None):
        places = {"DATA.ROOT": generated / CLASSIFICATION, "OUTPUT_DIR": folder, "REGISTRY": folder / "backbones"}
        return load_distill_config(CONFIGS / "distill" / "shapes.yaml", words_of(STAGE_ONE, places, keys or {}))

    return config


@pytest.fixture(scope="session")
def stage_one(stage_one_config, gpu_device):
    """``stage_one(folder, keys, on=device)``: results of a run, and the metrics of each student under ``rows``."""

    def run(folder, keys=None, on=""):
        with pytest.MonkeyPatch.context() as patch:
            if on == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            with computing_on(on or gpu_device):
                results = distill(stage_one_config(folder, keys))
        rows = {
            word: read_metrics(folder / "students" / word / "metrics.jsonl") for word in results if word != "teacher"
        }
        return {**results, "rows": {word: [row for row in found if "lr" in row] for word, found in rows.items()}}

    return run


@pytest.fixture(scope="session")
def backbones(stage_one, tmp_path_factory):
    """A first run in bfloat16: a teacher, and students of several methods side by side."""
    methods = ["ce", "kd+nst-poly", "fitnet+at", "nst-gaussian", "vid+lp"]
    return stage_one(tmp_path_factory.mktemp("first"), {"METHODS": methods, "SOLVER.AMP.DTYPE": "bf16"})


@pytest.fixture
def from_teacher(backbones):
    """Keys of a float32 run with the first run's teacher."""
    teacher = backbones["teacher"]["backbone"]
    return {"TEACHER.WEIGHTS": teacher, "METHODS": ["kd+nst-poly"], "SOLVER.AMP.ENABLED": False}


@pytest.fixture(scope="session")
def detector_words(generated, gpu_device):
    """``detector_words(folder, engine, keys)``: ``KEY VALUE`` pairs on top of :func:`detector_config`."""

    def words(folder, engine, keys=None):
        places = {"ENGINE": engine, "OUTPUT_DIR": folder, "MODEL.DEVICE": gpu_device}
        return words_of(STAGE_TWO, places, keys or {})

    return words


@pytest.fixture(scope="session")
def detector_config():
    """The demo's detector."""
    return CONFIGS / "detect" / "shapes.yaml"


@pytest.fixture(scope="session")
def stage_two(detector_words, detector_config, gpu_device):
    """``stage_two(folder, engine, keys, on=device)``: the metrics of a run of ``nst-det train-det``."""

    def run(folder, engine, keys=None, on=""):
        keys = {**(keys or {}), **({"MODEL.DEVICE": on} if on else {})}
        words = ["--config-file", str(detector_config), *detector_words(folder, engine, keys)]
        with computing_on(on or gpu_device), pytest.raises(SystemExit) as left:
            main(["train-det", *words])
        assert left.value.code == 0
        return read_metrics(folder / "metrics.jsonl")

    return run


@pytest.fixture(scope="session")
def detectors(stage_two, generated, tmp_path_factory):
    """``detectors(engine)``: the folder of a first run of plain training."""
    made = {}

    def trained(engine):
        if engine not in made:
            folder = tmp_path_factory.mktemp(engine) / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NST_DET_SHAPES", str(generated))
                stage_two(folder, engine)
            made[engine] = folder
        return made[engine]

    return trained


@pytest.fixture
def taught(detectors, detector_config, tmp_path):
    """``taught(engine)``: keys of a student with ``nst-poly`` on two levels, from that first run's detector."""

    def keys(engine):
        teacher = tmp_path / "teacher.yaml"
        teacher.write_text(f"_BASE_: {detector_config}\nMODEL: {{FPN: {{OUT_CHANNELS: 32}}}}\n")
        return {
            "METHOD": "nst-poly:1",
            "TRANSFER.LEVELS": ["p3", "p4"],
            "TEACHER.CONFIG_FILE": teacher,
            "TEACHER.WEIGHTS": detectors(engine) / "model.safetensors",
        }

    return keys
