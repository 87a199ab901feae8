"""From a convolutional teacher to a perceptron."""

from pathlib import Path

import pytest

from nst_det.distillation.config import load_distill_config
from nst_det.distillation.pipeline import distill
from nst_det.errors import UserError
from nst_det.models import load_card

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "distill" / "mlp" / "shapes.yaml"
METHODS = ["ce", "kd", "fitnet", "vid", "vid-logits", "lp", "kd+vid"]


def run(images, output, **changes):
    values = {
        "DATA.ROOT": images,
        "DATA.IMAGE_SIZE": 32,
        "OUTPUT_DIR": output,
        "REGISTRY": output / "backbones",
        "STUDENT.ARCH_KWARGS": {"img_size": 8, "depth": 2},
        "TEACHER.ARCH": "nst_resnet10_w32",
        "TEACHER.SOLVER": {"MAX_ITER": 1},
        "TEACHER.EXPECTED_TOP1": 0.0,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.AMP.ENABLED": False,
        "LOG_PERIOD": 1,
        **changes,
    }
    words = [str(word) for pair in values.items() for word in pair]
    return distill(load_distill_config(CONFIG, words))


def test_every_method_of_the_config_trains_and_learns_the_same_from_a_cache(images, tmp_path, caplog):
    caplog.set_level("INFO")
    live = run(images, tmp_path / "live", **{"CACHE.VIEWS": 1})
    assert list(live) == ["teacher", *METHODS]
    assert "hidden1: 1024 x 1 x 1   res3: 64 x 4 x 4, stride 8" in caplog.text
    assert "student spread over, teacher averaged to 4 x 4" in caplog.text
    keys = {"CACHE.VIEWS": 1, "TEACHER.WEIGHTS": live["teacher"]["backbone"]}
    cached = ["vid", "lp"]
    kept = run(images, tmp_path / "kept", METHODS=cached, **keys, **{"CACHE.DIR": tmp_path / "cache"})
    assert {word: live[word]["sha256"] for word in cached} == {word: kept[word]["sha256"] for word in cached}
    assert len({live[word]["sha256"] for word in METHODS}) == len(METHODS), "each term reaches the student"
    card = load_card(live["vid"]["backbone"])
    assert card.levels["hidden2"] == {"stride": 0, "channels": 1024}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"METHODS": ["kd+nst-poly"]},
            "nst-poly compares maps, but the student has vectors only (hidden1, hidden2); f",
        ),
        (
            {"METHODS": ["at"], "TRANSFER.LEVELS": ["res3"]},
            "at compares maps, but the student has vectors only (hidden1, hidden2); for it there are kd, fitnet, "
            "vid, vid-logits, lp",
        ),
        (
            {"METHODS": ["vid"], "TRANSFER.LEVELS": ["res3"]},
            "vid: the student has no level 'res3'; it has hidden1, hid",
        ),
        (
            {"METHODS": ["vid"], "TRANSFER.OPTIONS": {"vid": {"grid": 0}}},
            "vid: grid must be a whole number of at least 1",
        ),
        (
            {"METHODS": ["vid"], "TEACHER.ARCH": "nst_mlp_w1024", "TRANSFER.LEVELS": ["hidden1"]},
            "vid: the teacher has no level 'hidden1'; it has none",
        ),
    ],
)
def test_what_a_perceptron_cant_learn_is_said_in_one_line(images, tmp_path, keys, says):
    with pytest.raises(UserError) as caught:
        run(images, tmp_path, **keys)
    assert f"config: TRANSFER: {says}" in str(caught.value)
    assert "\n" not in str(caught.value)
