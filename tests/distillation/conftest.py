from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

CLASSES, SIZE = 3, 32


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_images(root: Path, train: int, val: int, size: int = SIZE, classes: int = CLASSES) -> Path:
    """An image folder of noise in which each class has its own dark band."""
    noise = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8)
                pixels[label * size // classes : (label + 1) * size // classes] //= 2
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 training and 12 validation images of 32 x 32 in 3 classes."""
    return write_images(tmp_path_factory.mktemp("images") / "bands", train=8, val=4)
