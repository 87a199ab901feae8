import shutil

import pytest

from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A folder as a new user has it: 30 images of one's own in VOC layout, without lists, and nothing else."""
    settings = GenerateSettings(
        classification_images=3,
        classification_val_images=3,
        classification_classes=3,
        detection_images=24,
        detection_test_images=6,
        detection_classes=3,
    )
    voc = generate_data(tmp_path / "generated", settings, workers=1) / DETECTION
    folder = tmp_path / "new user"
    for name in ("Annotations", "JPEGImages"):
        shutil.copytree(voc / name, folder / "my_images" / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NST_DET_BACKBONES", str(tmp_path / "registry"))
    return folder
