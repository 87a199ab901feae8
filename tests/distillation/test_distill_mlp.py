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
        "CACHE.VIEWS": 1,
        **changes,
    }
    return distill(load_distill_config(CONFIG, [str(word) for pair in values.items() for word in pair]))


def test_every_method_of_the_config_trains_and_learns_the_same_from_a_cache(images, tmp_path, caplog):
    caplog.set_level("INFO")
    live = run(images, tmp_path / "live")
    assert list(live) == ["teacher", *METHODS]
    assert "hidden1: 1024 x 1 x 1   res3: 64 x 4 x 4, stride 8" in caplog.text
    assert "student spread over, teacher averaged to 4 x 4" in caplog.text
    keys, cached = {"TEACHER.WEIGHTS": live["teacher"]["backbone"], "CACHE.DIR": tmp_path / "cache"}, ["vid", "lp"]
    kept = run(images, tmp_path / "kept", METHODS=cached, **keys)
    assert {name: live[name]["sha256"] for name in cached} == {name: kept[name]["sha256"] for name in cached}
    assert len({live[name]["sha256"] for name in METHODS}) == len(METHODS), "each term reaches the student"
    assert load_card(live["vid"]["backbone"]).levels["hidden2"] == {"stride": 0, "channels": 1024}


VECTORS = r"but the student has vectors only \(hidden1, hidden2\); "


@pytest.mark.parametrize(
    ("method", "levels", "keys", "named"),
    [
        ("kd+nst-poly", None, {}, f"nst-poly compares maps, {VECTORS}"),
        ("at", ["res3"], {}, f"at compares maps, {VECTORS}for it there are kd, fitnet, vid, vid-logits, lp"),
        ("vid", ["res3"], {}, "vid: the student has no level 'res3'; it has hidden1, hidden2"),
        ("vid", None, {"TRANSFER.OPTIONS": {"vid": {"grid": 0}}}, "vid: grid must be a whole number"),
        ("vid", ["hidden1"], {"TEACHER.ARCH": "nst_mlp_w1024"}, "vid: the teacher has no level 'hidden1'"),
    ],
)
def test_what_a_perceptron_cant_learn_is_refused(images, tmp_path, method, levels, keys, named):
    levels = {"TRANSFER.LEVELS": levels} if levels else {}
    with pytest.raises(UserError, match=f"TRANSFER: {named}") as caught:
        run(images, tmp_path, METHODS=[method], **levels, **keys)
    assert "\n" not in str(caught.value)
