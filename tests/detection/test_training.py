"""Runs of the torchvision engine, from their folders to their results."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nst_det.data.voc import VocDataset
from nst_det.detection import pipeline
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.config import load_detect_config
from nst_det.detection.data import data_classes
from nst_det.detection.fingerprint import input_fingerprints
from nst_det.detection.pipeline import evaluate_detector, train_detector
from nst_det.detection.replay import rebuild
from nst_det.detection.torchvision import Detector, build_detector
from nst_det.detection.torchvision.rpn import Rpn
from nst_det.detection.trainer import Trainer
from nst_det.engine.checkpoint import checkpoints
from nst_det.engine.io import read_json
from nst_det.engine.metrics import read_metrics
from nst_det.engine.nan_guard import read_step, replay
from nst_det.engine.run_dir import RunFolder
from nst_det.engine.train_state import OptimizedState
from nst_det.errors import UserError
from nst_det.losses.loss_balance import GradientBalance
from tests.helpers.detection import same_bits

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "detect"
UNTESTED = {"DATASETS.TEST": []}
WIDE = {"MODEL.TIMM.ARCH": "nst_resnet18_w48", "MODEL.FPN.OUT_CHANNELS": 24}
FIGURES = {"map", "map_area", "per_class", "per_class_area", "map_by_iou", "coco", "objects", "objects_per_class"}


def rows_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def same_runs(one, other):
    return same_bits(one, other) and rows_of(one) == rows_of(other)


@pytest.fixture
def wide_teacher(untrained_teacher):
    return {"TRANSFER.LEVELS": ["p2", "p3"], "TRANSFER.WARMUP_ITERS": 4, **untrained_teacher(WIDE)}


def test_a_run_and_its_folder(on_shapes, tmp_path):
    config = on_shapes(changes={"TEST.EVAL_PERIOD": 3})
    result = train_detector(config)
    folder = tmp_path / "run"
    assert json.loads((folder / "result.json").read_text()) == result
    assert set(result) == FIGURES | {
        "seconds", "steps", "engine", "params", "seed", "method", "weights", "losses", "speed",
    }  # fmt: skip
    assert (result["engine"], result["method"], result["steps"], result["seed"]) == ("torchvision", "ce", 6, 0)
    assert set(result["per_class"]) <= set(data_classes(config))
    rows = rows_of(folder)
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
    # nothing more is written, and nothing is done twice, also where more is asked for
    assert not (folder / "tensorboard").exists()
    assert train_detector(on_shapes(changes={"TEST.EVAL_PERIOD": 3, "TENSORBOARD": True})) == result


def test_training_learns(on_shapes, tmp_path):
    train_detector(on_shapes(changes={**UNTESTED, "SOLVER.MAX_ITER": 30, "SOLVER.BASE_LR": 0.003, "TENSORBOARD": True}))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl", speed=True)
    totals = [row["total_loss"] for row in rows]
    # 0.56 to 0.68 with three seeds, in bf16 and in float32
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])
    # TensorBoard has the numbers of the metrics
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss_cls", "loss_rpn_loc", "total_loss", "lr", "speed/images_per_second"):
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["ADAMW", "SGD", "taught"])
def test_a_resumed_run_ends_with_the_same_bits(on_shapes, tmp_path, stops_after_saving, wide_teacher, kind):
    changes = {"SOLVER.OPTIMIZER": kind, "SOLVER.AMP.ENABLED": True, "INPUT.MIN_SIZE_TRAIN": [64, 96]}
    if kind == "taught":
        # three of the five steps that are measured come before the stop
        changes = {**wide_teacher, "METHOD": "kd+fitnet:3+nst-poly"}
        changes["TRANSFER.AUTO_WEIGHT"] = {"nst-poly": 0.5, "fitnet": 0.5}
        changes["INPUT.AUGMENTATION"] = "strong"
    undisturbed = train_detector(on_shapes("one", changes))
    with stops_after_saving(3), pytest.raises(UserError, match="stopped"):
        train_detector(on_shapes("two", changes))
    resumed = train_detector(on_shapes("two", changes))
    assert same_runs(tmp_path / "one", tmp_path / "two")
    for name in ("map", "map_area", "per_class", "coco", "losses", "weights"):
        assert undisturbed[name] == resumed[name]
    assert (tmp_path / "one" / "detections.json").read_bytes() == (tmp_path / "two" / "detections.json").read_bytes()
    student = build_detector(on_shapes("x", {"MODEL.ROI_HEADS.NUM_CLASSES": 8}))
    assert set(load_file(tmp_path / "one" / "model.safetensors")) == set(student.state_dict())
    if kind == "taught":
        assert resumed["method"] == "kd+fitnet:3+nst-poly"
        assert {"loss_transfer_nst-poly", "loss_transfer_fitnet", "loss_transfer_kd"} <= set(resumed["losses"])
        assert (resumed["weights"]["kd"], resumed["weights"]["fitnet"]) == (1.0, 3.0)
        assert resumed["weights"]["nst-poly"] not in (0.0, 1.0, 50.0)


def test_a_teacher_whose_weights_are_cast_once_teaches_the_same_bits(on_shapes, tmp_path, wide_teacher, monkeypatch):
    monkeypatch.setattr(pipeline, "amp_dtype", lambda *_: torch.bfloat16)
    changes = {**wide_teacher, **UNTESTED, "METHOD": "kd+nst-poly", "TRANSFER.LEVELS": ["p2", "res3"]}
    changes |= {"SOLVER.MAX_ITER": 3, "SOLVER.AMP.ENABLED": True}
    train_detector(on_shapes("one", changes))
    # left to autocast, which casts them anew at each step
    asked = []
    monkeypatch.setattr(pipeline, "cast_frozen", lambda _, dtype: asked.append(dtype))
    train_detector(on_shapes("two", changes))
    assert asked == [torch.bfloat16]
    assert same_bits(tmp_path / "one", tmp_path / "two")


def test_methods_begin_alike_and_measuring_changes_nothing(on_shapes, tmp_path, wide_teacher, monkeypatch):
    changes = {**wide_teacher, **UNTESTED, "SOLVER.MAX_ITER": 3}
    train_detector(on_shapes("ce", {**UNTESTED, "SOLVER.MAX_ITER": 1}))
    train_detector(on_shapes("one", {**changes, "METHOD": "kd+nst-poly"}))
    one, other = (rows_of(tmp_path / name)[0] for name in ("ce", "one"))
    for name in ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"):
        assert one[name] == other[name]
    monkeypatch.setattr(GradientBalance, "wants", lambda *_: False)
    train_detector(on_shapes("two", {**changes, "METHOD": "kd+nst-poly"}))
    assert same_runs(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"METHOD": "nst-poly", "TEACHER.WEIGHTS": ""}, "TEACHER.WEIGHTS: the teacher's p2, p3 would be random"),
        ({"METHOD": "kd", "TEACHER.WEIGHTS": ""}, "TEACHER.WEIGHTS: the teacher's box head would be random"),
        ({"METHOD": "ce", "MODEL.TIMM.NORM": "FrozenBN"}, "MODEL.WEIGHTS is empty"),
        ({"METHOD": "ce", "SOLVER.BASE_LR": 1e25, "SOLVER.WARMUP_ITERS": 0}, "not finite"),
        ({"METHOD": "ce", "SOLVER.ACCUMULATE": 4}, "SOLVER.IMS_PER_BATCH"),
        ({"METHOD": "ce", "DATASETS.TRAIN": []}, "DATASETS.TRAIN"),
        ({"METHOD": "ce", "DATASETS.TEST": ["shapes_test", "shapes_trainval"]}, "DATASETS.TEST"),
    ],
)
def test_a_run_that_cant_be_made_is_one_line(on_shapes, wide_teacher, changes, named):
    with pytest.raises(UserError, match=named):
        train_detector(on_shapes("run", {**wide_teacher, **changes}))


@pytest.mark.parametrize("key", ["DATASETS.TEST", "DATASETS.VAL"])
def test_a_class_that_is_tested_but_not_trained_is_refused(on_shapes, shapes, tmp_path, key):
    """The figures would be those of the other classes, without a word."""
    shutil.copytree(shapes, tmp_path / "data")
    changed = tmp_path / "data" / "Annotations" / f"{VocDataset(shapes, 'test').ids[-1]}.xml"
    name = VocDataset(shapes, "test").annotation(changed.stem).objects[0].name
    changed.write_text(changed.read_text().replace(f"<name>{name}</name>", "<name>zebra</name>", 1))
    sets = {"shapes_trainval": "trainval", "shapes_test": "test"}
    voc = {data: {"ROOT": str(tmp_path / "data"), "SPLIT": split} for data, split in sets.items()}
    changes = {**UNTESTED, "DATASETS.VOC": voc, key: ["shapes_test"]}
    with pytest.raises(UserError, match=rf"{key} shapes_test: .*{changed.name}: .*'zebra'.*DATASETS.CLASSES"):
        train_detector(on_shapes("run", changes))
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_a_folder_with_another_run_is_refused(on_shapes):
    train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 1}))
    with pytest.raises(UserError, match=r"SOLVER.MAX_ITER 1.* 2"):
        train_detector(on_shapes(changes={"SOLVER.MAX_ITER": 2}))


def test_kd_from_a_teacher_of_other_classes_is_refused(on_shapes, tmp_path, wide_teacher):
    names = list(data_classes(on_shapes("x")))
    teacher = build_detector(on_shapes("x", {**WIDE, "MODEL.ROI_HEADS.NUM_CLASSES": 8}), 7)
    save_weights(tmp_path / "teacher.safetensors", teacher, names[::-1])
    with pytest.raises(UserError, match=f"METHOD kd: .*{names[0]}, .*{names[-1]}, "):
        train_detector(on_shapes("one", {**wide_teacher, "METHOD": "kd"}))
    # maps don't care
    changes = {**wide_teacher, **UNTESTED, "METHOD": "nst-poly", "SOLVER.MAX_ITER": 1}
    assert train_detector(on_shapes("two", changes))["steps"] == 1


def test_a_teacher_whose_classes_have_no_names(small, on_shapes, tmp_path):
    config = small({"MODEL.ROI_HEADS.NUM_CLASSES": 80})
    save_weights(tmp_path / "coco.safetensors", build_detector(config, 7), [])
    (tmp_path / "coco.yaml").write_text(config.dump())
    teacher = {"TEACHER.CONFIG_FILE": tmp_path / "coco.yaml", "TEACHER.WEIGHTS": tmp_path / "coco.safetensors"}
    changes = {**UNTESTED, **teacher, "METHOD": "nst-poly", "TRANSFER.LEVELS": ["p2"], "SOLVER.MAX_ITER": 1}
    assert train_detector(on_shapes("run", changes))["steps"] == 1


def test_another_teacher_makes_another_run(on_shapes, tmp_path, untrained_teacher):
    weights = tmp_path / "teacher.safetensors"
    named = untrained_teacher({"MODEL.WEIGHTS": str(weights)})
    config, seen = on_shapes("run", {**named, "TEACHER.WEIGHTS": ""}), []
    # the weights that its config names, and a config that only Detectron2 reads
    for path, text in ((weights, "trained"), (weights, "again"), (tmp_path / "teacher.yaml", "A: !!python/tuple [1]")):
        path.write_text(text)
        seen.append(input_fingerprints(config))
    assert [one for one in seen if seen.count(one) > 1] == []


def test_a_negative_seed_is_drawn_once(on_shapes, tmp_path):
    result = train_detector(on_shapes(changes={"SEED": -1, "SOLVER.MAX_ITER": 1}))
    assert json.loads((tmp_path / "run" / "seed.json").read_text()) == result["seed"] >= 0


def test_evaluation_alone(on_shapes, tmp_path):
    result = train_detector(on_shapes())
    named = on_shapes(changes={"MODEL.WEIGHTS": str(tmp_path / "run" / "model.safetensors")})
    for config, resume in ((named, False), (on_shapes(), True)):
        found = evaluate_detector(config, resume)
        assert found == {name: result[name] for name in FIGURES}
    inference = tmp_path / "run" / "inference"
    assert (inference / "detections.json").read_bytes() == (tmp_path / "run" / "detections.json").read_bytes()
    assert json.loads((inference / "result.json").read_text())["map"] == result["map"]
    with pytest.raises(UserError, match="--eval-only needs a whole detector"):
        evaluate_detector(on_shapes())


def test_the_command(on_shapes, tmp_path, cli, capsys):
    (tmp_path / "a.yaml").write_text(on_shapes(changes={"SOLVER.MAX_ITER": 1, "ENGINE": "torchvision"}).dump())
    command = ["train-det", "--config-file", tmp_path / "a.yaml"]
    assert cli(*command) == 0
    assert "AP 11-point" in capsys.readouterr().out
    assert cli(*command, "--eval-only", "--resume") == 0
    assert cli(*command, "MODEL.MASK_ON", "True") == 2
    error = capsys.readouterr().err
    assert "MODEL.MASK_ON True" in error
    assert "Traceback" not in error


@pytest.fixture
def poisoned(monkeypatch, taught):
    """Keys of a student, and a call that makes an adapter of it infinite in step 4, so many times."""

    def poison(times):
        backward, left = Trainer.backward, {"times": times}

        def poisoned_backward(self, batch):
            if self.iter == 4 and left["times"] > 0:
                left["times"] -= 1
                with torch.no_grad():
                    next(self.model.transfer.terms["fitnet"]["p3"].parameters()).fill_(math.inf)
            return backward(self, batch)

        monkeypatch.setattr(Trainer, "backward", poisoned_backward)

    return {**UNTESTED, **taught}, poison


def test_terms_levels_and_images_are_named_and_the_step_runs_again(on_shapes, tmp_path, poisoned, cli, capsys):
    changes, poison = poisoned
    poison(times=1)
    file = tmp_path / "run" / "nonfinite" / "step-00000004.pt"
    # frozen layers, which have weights from a file, and paths that are dropped by chance
    frozen = {"MODEL.WEIGHTS": changes["TEACHER.WEIGHTS"], "MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.TIMM.NORM": "FrozenBN"}
    changes |= {**frozen, "MODEL.TIMM.PRETRAINED": True, "MODEL.TIMM.KWARGS": {"drop_path_rate": 0.5}}
    with pytest.raises(UserError, match=rf"^not finite at step 4: loss_transfer_fitnet \(p3\); images .*{file}"):
        train_detector(on_shapes("run", changes))
    content = read_step(file)
    assert content["not_finite"] == ["loss_transfer_fitnet (p3)"]
    ended = read_json(RunFolder(tmp_path / "run").not_finite_path)
    assert ended == {"step": 4, "not_finite": content["not_finite"]}
    assert [item["image_id"] for item in content["batch"]] == content["images"]
    capsys.readouterr()
    assert cli("replay", file) == 0
    shown = capsys.readouterr().out
    assert "the same as in the run" in shown
    row = next(line.split() for line in shown.splitlines() if "loss_rpn_cls" in line)
    # the terms that are finite have the same bits
    assert row[3] == row[5] == f"{content['terms']['loss_rpn_cls']:.9g}"
    # another process drops others
    assert replay({**content, "rank": 1}, file, rebuild).terms["loss_rpn_cls"] != content["terms"]["loss_rpn_cls"]


def test_a_skipped_step_changes_nothing(on_shapes, tmp_path, monkeypatch):
    forward, seen = Detector.forward, []

    def broken(self, batch):
        losses = forward(self, batch)
        seen.append({name: value.clone() for name, value in self.state_dict().items()})
        return {**losses, "loss_cls": losses["loss_cls"] * (math.nan if len(seen) == 4 else 1)}

    monkeypatch.setattr(Detector, "forward", broken)
    result = train_detector(on_shapes("run", {**UNTESTED, "SOLVER.NON_FINITE.POLICY": "skip"}))
    assert result["steps"] == 6
    assert all(math.isfinite(value) for value in result["losses"].values())
    assert [row["loss_cls"] is None for row in rows_of(tmp_path / "run")] == [False, False, False, True, False, False]
    # seen after each forward pass: the fifth began where the fourth had begun, running statistics included
    name = next(name for name in seen[0] if name.endswith("num_batches_tracked"))
    assert [int(state[name]) for state in seen] == [1, 2, 3, 4, 4, 5]
    weight = next(name for name in seen[0] if name.endswith("fc1.weight"))
    assert [torch.equal(seen[step][weight], seen[step + 1][weight]) for step in (3, 4)] == [True, False]


def test_rolling_back(on_shapes, tmp_path, poisoned):
    changes, poison = poisoned
    poison(times=1)
    for name in ("run", "whole"):
        train_detector(on_shapes(name, {**changes, "SOLVER.NON_FINITE.POLICY": "back"}))
    found, whole = rows_of(tmp_path / "run"), rows_of(tmp_path / "whole")
    assert [row["lr"] for row in found] == [row["lr"] * (1 if row["step"] < 3 else 0.5) for row in whole]
    assert found[:3] == whole[:3]


@pytest.fixture
def unread(monkeypatch):
    """A call: from there on the host learns a step later how a step ended, as on a GPU."""
    return lambda: monkeypatch.setattr(OptimizedState, "waits", property(lambda self: self.suspect == self.step))


# what is read in the next step and at a checkpoint; proposals that no loss shows
@pytest.mark.parametrize(
    ("faulty", "what", "policy", "keys"),
    [
        (3, "loss_cls", "skip", {"SOLVER.EMA_DECAY": 0.9}),
        (4, "proposals", "back", {"SOLVER.OPTIMIZER": "SGD", "SOLVER.ACCUMULATE": 2}),
        (5, "proposals", "skip", {"SOLVER.CLIP_GRADIENTS": {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 0.1}}),
    ],
)
def test_a_fault_that_is_seen_a_step_later_is_handled_alike(
    on_shapes, tmp_path, taught, monkeypatch, unread, faulty, what, policy, keys
):
    backward, forward, propose = Trainer.backward, Detector.forward, Rpn.propose
    made, broken = [], []

    def noted(self, batch):
        made.append(self.iter)
        broken[:] = [self.iter == faulty and not self.state.guard.count]
        return backward(self, batch)

    def with_loss(self, batch):
        losses = forward(self, batch)
        factor = math.nan if self.training and broken[0] and what == "loss_cls" else 1
        return {**losses, "loss_cls": losses["loss_cls"] * factor} if self.training else losses

    def with_proposals(self, anchors, logits, deltas, *more):
        if self.training and broken[0] and what == "proposals":
            deltas = [torch.full_like(deltas[0], math.inf), *deltas[1:]]
        return propose(self, anchors, logits, deltas, *more)

    for place, name, function in (
        (Trainer, "backward", noted), (Detector, "forward", with_loss), (Rpn, "propose", with_proposals)
    ):  # fmt: skip
        monkeypatch.setattr(place, name, function)
    changes = {**UNTESTED, **taught, "SOLVER.NON_FINITE.POLICY": policy, **keys}
    steps = {}
    for name in ("known", "unread"):
        train_detector(on_shapes(name, changes))
        steps[name], made[:] = list(made), []
        unread()
    assert same_runs(tmp_path / "known", tmp_path / "unread")
    dumps = [read_step(file) for name in steps for file in (tmp_path / name).rglob("nonfinite/*.pt")]
    assert len(dumps) == 2
    for content in dumps:
        assert content["step"] == faulty
        assert what in content["not_finite"][0]
        assert all(torch.equal(content["model"][name], value) for name, value in dumps[0]["model"].items())
    # it was made again, and in vain the one after it had been begun
    again = steps["unread"]
    for step in steps["known"]:
        again.remove(step)
    assert again == [faulty] + [faulty + 1] * (faulty < 5)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_saves_and_the_same_command_resumes(on_shapes, tmp_path, monkeypatch, cli, signum, workers):
    changes = {**UNTESTED, "SOLVER.CHECKPOINT_PERIOD": 100, "DATALOADER.NUM_WORKERS": workers, "ENGINE": "torchvision"}
    train_detector(on_shapes("whole", changes))
    (tmp_path / "run.yaml").write_text(on_shapes("run", changes).dump())
    step = Trainer.run_step

    def signalled(self):
        if self.iter == 2:
            os.kill(os.getpid(), signum)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", signalled)
        assert cli("train-det", "--config-file", tmp_path / "run.yaml") == 75
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003.pt"]
    assert cli("train-det", "--config-file", tmp_path / "run.yaml") == 0
    assert same_runs(tmp_path / "whole", tmp_path / "run")


FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("step", "error", "resumes"),
    [(4, FULL, "step-00000003.pt"), (1, RuntimeError("CUDA error: device lost\nx"), "no checkpoint")],
)
def test_a_gpu_that_fails_is_one_line_and_the_same_command_resumes(
    on_shapes, tmp_path, monkeypatch, cli, capsys, step, error, resumes
):
    changes = {**UNTESTED, "ENGINE": "torchvision"}
    train_detector(on_shapes("whole", changes))
    (tmp_path / "run.yaml").write_text(on_shapes("run", changes).dump())
    forward, calls = Detector.forward, []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == step + 1:
            raise error
        return forward(self, batch)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "forward", failing)
        assert cli("train-det", "--config-file", tmp_path / "run.yaml") == 2
    printed = capsys.readouterr().err
    line = printed.splitlines()[-1]
    assert ("Traceback" in printed, "forward pass in" in printed) == (False, True)
    assert line.startswith(f"nst-det: {str(error).partition(' GPU 0')[0].partition(chr(10))[0].rstrip('.')}; ")
    assert ("SOLVER.ACCUMULATE" in line) == ("memory" in line)
    assert resumes in line
    if error is FULL:
        # also while it resumes: the checkpoint is not at fault
        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Optimizer, "load_state_dict", lambda *_: (_ for _ in ()).throw(FULL))
            with pytest.raises(UserError, match=f"^CUDA out of memory.*{resumes}"):
                train_detector(on_shapes("run", changes))
    assert cli("train-det", "--config-file", tmp_path / "run.yaml") == 0
    assert same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(on_shapes, tmp_path, caplog):
    for name in ("whole", "run"):
        train_detector(on_shapes(name, {**UNTESTED, "SOLVER.CHECKPOINT_PERIOD": 2}))
    for name in ("result.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    train_detector(on_shapes("run", {**UNTESTED, "SOLVER.CHECKPOINT_PERIOD": 2}))
    assert f"{newest}: damaged checkpoint" in caplog.text
    assert same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.real_data
def test_a_few_steps_on_real_blood_cells(real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("NST_DET_REAL_DATA", str(real_data))
    words = ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "5", "DATASETS.TEST", "[]"]
    result = train_detector(load_detect_config(CONFIGS / "bccd.yaml", words))
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["total_loss"] < rows[0]["total_loss"]
    assert result["params"] > 1_000_000


@pytest.mark.parametrize("arch", [{}, {"MODEL.BACKBONE.NAME": "build_timm_backbone"}], ids=["FPN", "no FPN"])
def test_compiled_backbones_train_alike(on_shapes, tmp_path, captured_graphs, untrained_teacher, arch):
    """Student and teacher, whose maps are taken between their two graphs; gradients are added up in another order."""
    if arch:
        arch |= {"MODEL.RPN.IN_FEATURES": ["res4"], "MODEL.ROI_HEADS.IN_FEATURES": ["res4"]}
        arch |= {"MODEL.ANCHOR_GENERATOR.SIZES": [[12, 24, 48]]}
    changes = {"METHOD": "nst-poly:1", "TRANSFER.LEVELS": ["res3"] if arch else ["res3", "p3"], "SOLVER.EMA_DECAY": 0.9}
    changes |= {"INPUT.PADDED_SIZES": [[96, 128], [128, 128]], "SOLVER.MAX_ITER": 2, **UNTESTED}
    changes |= {**arch, **untrained_teacher(arch)}
    for mode in ("off", "default"):
        train_detector(on_shapes(mode, {**changes, "SOLVER.COMPILE": mode}))
    assert len(captured_graphs) >= (2 if arch else 4)
    plain, found = (rows_of(tmp_path / mode) for mode in ("off", "default"))
    assert found == [pytest.approx(row, rel=1e-4) for row in plain]
    assert found[0]["loss_transfer_nst-poly"] > 0
    plain, found = (load_file(tmp_path / mode / "model.safetensors") for mode in ("off", "default"))
    assert found.keys() == plain.keys()
    statistics = [name for name in plain if "running" in name]
    torch.testing.assert_close(*[[run[name] for name in statistics] for run in (found, plain)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "padded"),
    [
        ({}, [(96, 96), (64, 96), (96, 64)]),
        # made multiples of 32
        ({"INPUT.PADDED_SIZES": [[128, 128], [64, 112]]}, [(128, 128), (64, 128), (128, 128)]),
        # wide, tall and square
        ({"SOLVER.COMPILE": "default", "INPUT.MIN_SIZE_TRAIN": [70]}, [(96, 96), (96, 96), (96, 96)]),
        ({"SOLVER.COMPILE": "default", "INPUT.MIN_SIZE_TRAIN": [64]}, [(96, 96), (64, 96), (96, 64)]),
    ],
)
def test_batches_are_padded_to_the_smallest_size_that_holds_them(small, changes, padded):
    detector = build_detector(small(changes)).train()
    for batch, size in zip(([(64, 96), (96, 64)], [(60, 90), (50, 40)], [(96, 40)]), padded):
        images, _ = detector.preprocess([torch.zeros(3, *sides) for sides in batch])
        assert tuple(images.shape[-2:]) == size
    # evaluated images are padded to a multiple alone
    images, _ = detector.eval().preprocess([torch.zeros(3, 40, 50)])
    assert tuple(images.shape[-2:]) == (64, 64)


def test_cudnn_tries_its_kernels_in_training_alone(on_shapes, monkeypatch):
    """As on a GPU: the images of an evaluation have too many sizes."""
    seen = {}
    forward = Detector.forward

    def watched(self, batch):
        seen.setdefault(self.training, set()).add(torch.backends.cudnn.benchmark)
        return forward(self, batch)

    monkeypatch.setattr(Detector, "forward", watched)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(
        pipeline, "set_cudnn_benchmark", lambda wanted, _: setattr(torch.backends.cudnn, "benchmark", wanted)
    )
    train_detector(on_shapes(changes={"CUDNN_BENCHMARK": True, "SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 1}))
    assert seen == {True: {True}, False: {False}}


def test_sizes_that_do_not_hold_all_images_are_refused(small):
    with pytest.raises(UserError, match=r"INPUT.PADDED_SIZES: .*\[96, 96\]"):
        small({"INPUT.PADDED_SIZES": [[64, 96], [96, 64]]})
