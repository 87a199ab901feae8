import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nst_det.cli import main
from nst_det.detection import pipeline as stage
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.data import data_classes
from nst_det.detection.pipeline import evaluate_detector, train_detector
from nst_det.detection.torchvision import build_detector
from nst_det.engine import train_state
from nst_det.engine.metrics import read_metrics
from nst_det.errors import UserError
from nst_det.losses.loss_balance import GradientBalance

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detect"


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Make the next training end abruptly, as a kill would, after some checkpoint."""

    def arrange(step):
        save = train_state.save_checkpoint

        def save_and_stop(folder, at, state):
            save(folder, at, state)
            if at == step:
                raise Stopped

        monkeypatch.setattr(train_state, "save_checkpoint", save_and_stop)
        return lambda: monkeypatch.setattr(train_state, "save_checkpoint", save)

    return arrange


def same_files(one, other):
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_and_its_folder(on_shapes, tmp_path):
    config = on_shapes(changes={"TEST.EVAL_PERIOD": 3})
    result = train_detector(config)
    folder = tmp_path / "run"
    assert json.loads((folder / "result.json").read_text()) == result
    assert set(result) == {
        "map", "map_area", "per_class", "per_class_area", "map_by_iou", "coco", "objects", "seconds", "steps", "engine",
        "params", "seed", "method", "weights", "losses", "speed",
    }  # fmt: skip
    assert (result["engine"], result["method"], result["steps"], result["seed"]) == ("torchvision", "ce", 6, 0)
    assert set(result["per_class"]) <= set(data_classes(config))
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "total_loss", "lr"} <= set(rows[0])
    assert [row["step"] for row in rows if "map" in row] == [2]
    timed = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl", speed=True) if len(row) > len(rows[0])}
    assert list(timed) == [2, 5]
    assert result["speed"] == {name: timed[5][f"speed/{name}"] for name in ("images_per_second", "data_wait")}
    # all steps of this run took no longer than all of it
    assert result["speed"]["images_per_second"] > 6 * config.SOLVER.IMS_PER_BATCH / result["seconds"]
    assert 0 < result["speed"]["data_wait"] < 1
    records = json.loads((folder / "detections.json").read_text())
    assert set(records[0]) == {"image_id", "category", "bbox", "score"}
    assert {record["category"] for record in records} <= set(data_classes(config))
    assert not any("teacher" in name or "transfer" in name for name in load_file(folder / "model.safetensors"))
    # nothing is done twice
    assert train_detector(on_shapes(changes={"TEST.EVAL_PERIOD": 3})) == result


def test_training_learns(on_shapes, tmp_path):
    train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 30, "SOLVER.BASE_LR": 0.003, "DATASETS.TEST": []}))
    totals = [row["total_loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(totals[-5:]) < 0.6 * sum(totals[:5])


@pytest.mark.parametrize("kind", ["ADAMW", "SGD"])
def test_a_run_that_goes_on_ends_with_the_same_bits(on_shapes, tmp_path, stop_after, kind):
    changes = {"SOLVER.OPTIMIZER": kind, "SOLVER.AMP.ENABLED": True, "INPUT.MIN_SIZE_TRAIN": [64, 96]}
    undisturbed = train_detector(on_shapes("one", changes))
    restore = stop_after(3)
    with pytest.raises(Stopped):
        train_detector(on_shapes("two", changes))
    restore()
    gone_on = train_detector(on_shapes("two", changes))
    assert same_files(tmp_path / "one", tmp_path / "two")
    for name in ("map", "map_area", "per_class", "coco", "losses"):
        assert undisturbed[name] == gone_on[name]
    assert read_metrics(tmp_path / "one" / "metrics.jsonl") == read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert (tmp_path / "one" / "detections.json").read_bytes() == (tmp_path / "two" / "detections.json").read_bytes()


def test_a_folder_with_another_run_is_refused(on_shapes):
    train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 1}))
    with pytest.raises(UserError, match="this folder holds a run with SOLVER.MAX_ITER 1, now it is 2"):
        train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 2}))


def teacher_words(on_shapes, tmp_path, method):
    """A teacher detector's file and config, and the keys that make a student learn from it."""
    wide = {"MODEL.TIMM.ARCH": "nst_resnet18_w48", "MODEL.ROI_HEADS.NUM_CLASSES": 8, "MODEL.FPN.OUT_CHANNELS": 24}
    config = on_shapes("teacher", wide)
    save_weights(tmp_path / "teacher.safetensors", build_detector(config, 7), data_classes(config))
    (tmp_path / "teacher.yaml").write_text(config.dump())
    return {
        "METHOD": method,
        "TRANSFER.LEVELS": ["p2", "p3"],
        "TRANSFER.WARMUP_ITERS": 4,
        "TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
        "TEACHER.WEIGHTS": str(tmp_path / "teacher.safetensors"),
    }


def test_a_teacher_whose_weights_are_cast_once_teaches_the_same_bits(on_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "amp_dtype", lambda *_: torch.bfloat16)
    changes = {**teacher_words(on_shapes, tmp_path, "kd+nst-poly"), "DATASETS.TEST": [], "SOLVER.AMP.ENABLED": True}
    changes |= {"SOLVER.MAX_ITER": 3, "TRANSFER.LEVELS": ["p2", "res3"]}
    train_detector(on_shapes("one", changes))
    # left to autocast, which casts them anew at each step
    asked = []
    monkeypatch.setattr(stage, "cast_frozen", lambda _, dtype: asked.append(dtype))
    train_detector(on_shapes("two", changes))
    assert asked == [torch.bfloat16]
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_training_with_a_teacher_goes_on_with_the_same_bits(on_shapes, tmp_path, stop_after):
    changes = teacher_words(on_shapes, tmp_path, "kd+fitnet:3+nst-poly")
    changes["TRANSFER.AUTO_WEIGHT"] = {"nst-poly": 0.5, "fitnet": 0.5}
    result = train_detector(on_shapes("one", changes))
    assert result["method"] == "kd+fitnet:3+nst-poly"
    assert {"loss_transfer_nst-poly", "loss_transfer_fitnet", "loss_transfer_kd"} <= set(result["losses"])
    assert (result["weights"]["kd"], result["weights"]["fitnet"]) == (1.0, 3.0)
    assert result["weights"]["nst-poly"] not in (0.0, 1.0, 50.0)
    # three of the five steps are measured then
    restore = stop_after(3)
    with pytest.raises(Stopped):
        train_detector(on_shapes("two", changes))
    restore()
    gone_on = train_detector(on_shapes("two", changes))
    assert (gone_on["losses"], gone_on["weights"]) == (result["losses"], result["weights"])
    assert same_files(tmp_path / "one", tmp_path / "two")
    student = build_detector(on_shapes("x", {"MODEL.ROI_HEADS.NUM_CLASSES": 8}))
    assert set(load_file(tmp_path / "one" / "model.safetensors")) == set(student.state_dict())


def test_measuring_the_first_step_does_not_change_the_run(on_shapes, tmp_path, monkeypatch):
    changes = {**teacher_words(on_shapes, tmp_path, "kd+nst-poly"), "SOLVER.MAX_ITER": 3, "DATASETS.TEST": []}
    measured = train_detector(on_shapes("one", changes))
    monkeypatch.setattr(GradientBalance, "wants", lambda *_: False)
    assert train_detector(on_shapes("two", changes))["losses"] == measured["losses"]
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_a_teacher_whose_pyramid_is_random_is_refused(on_shapes, tmp_path):
    changes = teacher_words(on_shapes, tmp_path, "nst-poly")
    changes["TEACHER.WEIGHTS"] = ""
    with pytest.raises(UserError, match="TEACHER.WEIGHTS: the teacher's p2, p3 would be random"):
        train_detector(on_shapes("one", changes))
    with pytest.raises(UserError, match="TEACHER.WEIGHTS: the teacher's box head would be random"):
        train_detector(on_shapes("two", {**changes, "METHOD": "kd"}))


def test_kd_from_a_teacher_of_other_classes_is_refused(on_shapes, tmp_path):
    changes = teacher_words(on_shapes, tmp_path, "kd")
    config = on_shapes("x")
    names = list(data_classes(config))
    wide = {"MODEL.TIMM.ARCH": "nst_resnet18_w48", "MODEL.ROI_HEADS.NUM_CLASSES": 8, "MODEL.FPN.OUT_CHANNELS": 24}
    save_weights(tmp_path / "teacher.safetensors", build_detector(on_shapes("x", wide), 7), names[::-1])
    said = f"kd compares class by class, but the student's are {names[0]}, .*, the teacher's {names[-1]}, "
    with pytest.raises(UserError, match=said):
        train_detector(on_shapes("one", changes))
    # maps don't care
    changes["METHOD"] = "nst-poly"
    assert train_detector(on_shapes("two", {**changes, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": []}))["steps"] == 1


def test_methods_of_one_seed_begin_alike_and_see_the_same_batches(on_shapes, tmp_path):
    changes = teacher_words(on_shapes, tmp_path, "nst-poly")
    train_detector(on_shapes("ce", {"SOLVER.MAX_ITER": 1, "DATASETS.TEST": []}))
    train_detector(on_shapes("nst", {**changes, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": []}))
    (one,), (other,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ce", "nst"))
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
        assert one[name] == other[name]


def test_a_loss_that_is_not_finite_is_one_line(on_shapes):
    with pytest.raises(UserError, match="not finite"):
        train_detector(on_shapes(changes={"SOLVER.BASE_LR": 1e25, "SOLVER.WARMUP_ITERS": 0}))


def test_random_weights_can_not_be_frozen(on_shapes):
    with pytest.raises(UserError, match="MODEL.WEIGHTS is empty: freezing batch normalization would freeze"):
        train_detector(on_shapes(changes={"MODEL.TIMM.NORM": "FrozenBN"}))


def test_a_negative_seed_is_drawn_once(on_shapes, tmp_path):
    result = train_detector(on_shapes(changes={"SEED": -1, "SOLVER.MAX_ITER": 1}))
    assert json.loads((tmp_path / "run" / "seed.json").read_text()) == result["seed"] >= 0


def test_evaluation_alone(on_shapes, tmp_path):
    result = train_detector(on_shapes())
    for config, resume in (
        (on_shapes(changes={"MODEL.WEIGHTS": str(tmp_path / "run" / "model.safetensors")}), False),
        (on_shapes(), True),
    ):
        found = evaluate_detector(config, resume)
        assert found == {name: result[name] for name in found}
        assert set(found) == {
            "map", "map_area", "per_class", "per_class_area", "map_by_iou", "coco", "objects",
        }  # fmt: skip
    inference = tmp_path / "run" / "inference"
    assert (inference / "detections.json").read_bytes() == (tmp_path / "run" / "detections.json").read_bytes()
    assert json.loads((inference / "result.json").read_text())["map"] == result["map"]
    with pytest.raises(UserError, match="--eval-only needs a whole detector"):
        evaluate_detector(on_shapes())


def test_the_command(shapes, tmp_path, small_words, base_file, capsys):
    words = small_words(
        {
            "MODEL.ROI_HEADS.NUM_CLASSES": 0,
            "DATASETS.VOC": {
                "a": {"ROOT": str(shapes), "SPLIT": "trainval"},
                "b": {"ROOT": str(shapes), "SPLIT": "test"},
            },
            "DATASETS.TRAIN": ["a"],
            "DATASETS.TEST": ["b"],
            "OUTPUT_DIR": str(tmp_path / "run"),
            "SOLVER.MAX_ITER": 1,
            "ENGINE": "torchvision",
        }
    )
    command = ["train-det", "--config-file", str(base_file)]
    with pytest.raises(SystemExit) as ended:
        main([*command, *words])
    assert ended.value.code == 0
    assert "AP 11-point" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*command, "--eval-only", "--resume", *words])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main([*command, *words, "MODEL.MASK_ON", "True"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "can't honor MODEL.MASK_ON True" in error
    assert "Traceback" not in error


@pytest.mark.real_data
def test_a_few_steps_on_real_blood_cells(real_data, tmp_path, monkeypatch):
    from nst_det.detection.config import load_detect_config

    monkeypatch.setenv("NST_DET_REAL_DATA", str(real_data))
    words = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "5", "DATASETS.TEST", "[]"]
    result = train_detector(load_detect_config(CONFIGS / "bccd.yaml", words))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["total_loss"] < rows[0]["total_loss"]
    assert result["params"] > 1_000_000
