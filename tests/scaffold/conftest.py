import pytest

from nst_det.data.synthetic import DETECTION, GenerateSettings, generate_data


@pytest.fixture(scope="session")
def thirty(tmp_path_factory):
    """30 generated images in VOC layout (not to be written to)."""
    settings = GenerateSettings(
        classification_images=10,
        classification_val_images=10,
        detection_images=24,
        detection_test_images=6,
        detection_classes=3,
    )
    return generate_data(tmp_path_factory.mktemp("generated") / "data", settings, workers=1) / DETECTION
