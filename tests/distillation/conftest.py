from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.stage_one import run

CLASSES, SIZE = 3, 32


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 training and 12 validation images of 32 x 32: noise in which each of 3 classes has its own dark band."""
    root, noise = tmp_path_factory.mktemp("images") / "bands", np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                pixels[label * SIZE // CLASSES : (label + 1) * SIZE // CLASSES] //= 2
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """The folder of an undisturbed run of all methods, and its results."""
    output = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    return output, run(images, output)


@pytest.fixture
def taught(finished):
    """Keys that take the teacher of the undisturbed run."""
    return {"TEACHER.WEIGHTS": finished[1]["teacher"]["backbone"]}
