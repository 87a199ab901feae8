import itertools
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from detectron2.structures import Instances  # noqa: E402

from nst_det.detection.data import SampleIndex  # noqa: E402
from nst_det.detectron2.config import load_config, register_datasets  # noqa: E402
from nst_det.detectron2.data import SeededImages, build_train_loader  # noqa: E402
from nst_det.detectron2.trainer import DistillTrainer  # noqa: E402
from nst_det.errors import UserError  # noqa: E402


def test_augmentation_depends_on_seed_step_and_place_alone():
    def mapper(item):
        return item["value"], random.random(), np.random.rand()

    images = SeededImages([{"value": 0}, {"value": 1}], mapper, seed=5)
    first = images[SampleIndex(0, 7, 1)]
    random.seed(99)
    np.random.seed(99)
    state = random.getstate(), np.random.get_state()[1].copy()
    assert images[SampleIndex(0, 7, 1)] == first
    assert random.getstate() == state[0]
    assert (np.random.get_state()[1] == state[1]).all()
    assert images[SampleIndex(1, 7, 1)][1:] == first[1:]
    assert images[SampleIndex(0, 8, 1)][1:] != first[1:]
    assert images[SampleIndex(0, 7, 0)][1:] != first[1:]
    assert SeededImages([{"value": 0}], mapper, seed=6)[SampleIndex(0, 7, 1)][1:] != first[1:]


def whole(value):
    """Everything in a batch as lists and dicts."""
    if isinstance(value, Instances):
        fields = {"gt_boxes": value.gt_boxes.tensor, "gt_classes": value.gt_classes}
        assert set(value.get_fields()) == set(fields)
        return whole({"size": value.image_size, **fields})
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def test_workers_give_the_same_batches_and_ask_no_gpu_for_anything(tiny_yaml, cuda_in_use):
    found = []
    for workers in (0, 2):
        cfg = load_config(tiny_yaml, ["DATALOADER.NUM_WORKERS", str(workers), "MODEL.DEVICE", "cpu"])
        register_datasets(cfg)
        train = build_train_loader(cfg)
        train.batch_sampler.start = 3
        found.append([whole(batch) for batch in itertools.islice(train, 6)])
        assert [whole(batch) for batch in itertools.islice(train, 6)] == found[-1]
        found[-1] += [whole(batch) for batch in DistillTrainer.build_test_loader(cfg, "tiny_test")]
    assert found[0] == found[1]
    assert len(found[0]) == 6 + 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_evaluation_too(voc_root, tiny_yaml, tmp_path, workers):
    shutil.copytree(voc_root, tmp_path / "voc")
    (tmp_path / "c.yaml").write_text(tiny_yaml.read_text().replace(str(voc_root), str(tmp_path / "voc")))
    path = tmp_path / "voc" / "JPEGImages" / "i08.jpg"
    path.write_bytes(path.read_bytes()[:300])
    cfg = load_config(tmp_path / "c.yaml", ["DATALOADER.NUM_WORKERS", str(workers)])
    register_datasets(cfg)
    with pytest.raises(UserError, match=f"^{path}: ") as caught:
        list(DistillTrainer.build_test_loader(cfg, "tiny_test"))
    assert "Traceback" not in str(caught.value)


LOADERS = """
import sys, time
from nst_det.detectron2.config import load_config, register_datasets
from nst_det.detectron2.data import SeededImages, build_train_loader
from nst_det.detectron2.trainer import DistillTrainer
cfg = load_config(sys.argv[1], sys.argv[2:])
register_datasets(cfg)
loaders = [build_train_loader(cfg)]
"""
# Detectron2's own as well
ALL = """
loaders.append(DistillTrainer.build_test_loader(cfg, "tiny_test"))
for grouping in (True, False):
    unseeded = cfg.clone()
    unseeded.defrost()
    unseeded.SEED, unseeded.DATALOADER.ASPECT_RATIO_GROUPING = -1, grouping
    loaders.append(build_train_loader(unseeded))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_training_however_that_ends(tiny_yaml, signum, left_behind):
    words = ["DATALOADER.NUM_WORKERS", 3, "SOLVER.IMS_PER_BATCH", 32]
    assert left_behind(LOADERS + ALL, signum, tiny_yaml, *words) == []


# while one worker is slow, the others' batches wait in the parent
FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
given = SeededImages.__getitem__
def slow(self, place):
    if place.step in (5, 50) and place.slot == 0:
        time.sleep(2)
    return given(self, place)
SeededImages.__getitem__ = slow
for step, batch in zip(range(200), loaders[0]):
    assert len(batch) == 16
print("steps:", step + 1)
"""


@pytest.mark.slow
def test_batches_that_wait_take_few_files(tiny_yaml):
    words = ["DATALOADER.NUM_WORKERS", "12", "SOLVER.IMS_PER_BATCH", "16", "INPUT.MIN_SIZE_TRAIN", "[32]"]
    command = [sys.executable, "-c", LOADERS + FEW_FILES, str(tiny_yaml), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "steps: 200\n", done.stderr
