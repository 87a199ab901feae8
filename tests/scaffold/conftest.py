import pytest

from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data


@pytest.fixture(scope="session")
def thirty(tmp_path_factory):
    """30 generated images in VOC layout (not to be written to)."""
    counts = {"classification_images": 10, "classification_val_images": 10}
    counts |= {"detection_images": 24, "detection_test_images": 6, "detection_classes": 3}
    folder = tmp_path_factory.mktemp("generated") / "data"
    return generate_data(folder, GenerateSettings(**counts), workers=1) / DETECTION
