"""The trainer and the command, on a data set small enough for a test."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip(
    "detectron2",
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io/en/latest/tutorials/install.html",
)
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.engine import HookBase  # noqa: E402
from detectron2.layers import Conv2d  # noqa: E402
from detectron2.modeling import build_backbone, build_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.multiprocessing import ProcessRaisedException  # noqa: E402

from nst_det.detection.checkpoint import saved_classes  # noqa: E402
from nst_det.detectron2 import DistillTrainer  # noqa: E402
from nst_det.detectron2.config import load_config, register_datasets  # noqa: E402
from nst_det.detectron2.modeling import CanonicalROIHeads  # noqa: E402
from nst_det.detectron2.train_net import train  # noqa: E402
from nst_det.engine.config import flat  # noqa: E402
from nst_det.engine.device import cast_frozen  # noqa: E402
from nst_det.engine.metrics import read_metrics  # noqa: E402
from nst_det.engine.run_dir import RunFolder  # noqa: E402
from nst_det.errors import UserError  # noqa: E402


def nst_opts(tiny_teacher, method="nst-poly"):
    return [
        *("METHOD", method, "TRANSFER.LEVELS", "['p2', 'p3', 'p4', 'p5']", "TRANSFER.WARMUP_ITERS", "2"),
        *("TEACHER.CONFIG_FILE", str(tiny_teacher[0]), "TEACHER.WEIGHTS", str(tiny_teacher[1])),
    ]


def make_cfg(tiny_yaml, folder, *opts):
    cfg = load_config(tiny_yaml, [*opts, "OUTPUT_DIR", str(folder)])
    register_datasets(cfg)
    return cfg


def test_the_command_trains_evaluates_and_leaves_a_run_folder(command, tiny_yaml, tiny_teacher, tmp_path, capsys):
    folder = tmp_path / "run"
    opts = [*nst_opts(tiny_teacher), "OUTPUT_DIR", folder]
    assert command("--config-file", tiny_yaml, *opts) == 0
    result = json.loads((folder / "result.json").read_text())
    assert set(result["per_class"]) == {"bar", "square"}
    assert 0 <= result["map"] <= 1
    assert (result["engine"], result["steps"], result["seed"], result["method"]) == ("detectron2", 6, 3, "nst-poly")
    assert set(result["losses"]) == {
        *("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_transfer_nst-poly")
    }
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    # the weight rises over two steps, and Detectron2's own events have the term too
    assert 0 < rows[0]["loss_transfer_nst-poly"] < rows[1]["loss_transfer_nst-poly"]
    events = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert any("loss_transfer_nst-poly" in event for event in events)
    # so do they have its speed, which is told with the last step of this short run
    *others, timed = read_metrics(folder / "metrics.jsonl", speed=True)
    names = ("images_per_second", "data_wait")
    assert result["speed"] == {name: timed[f"speed/{name}"] for name in names}
    assert result["speed"]["images_per_second"] > 0
    assert 0 < result["speed"]["data_wait"] < 1
    assert not any(key.startswith("speed") for row in others for key in row)
    assert all(any(f"speed/{name}" in event for event in events) for name in names)
    found = json.loads((folder / "detections.json").read_text())
    assert {"image_id", "category", "bbox", "score"} == set(found[0])

    # what is done is not done again
    before = (folder / "model_final.pth").stat().st_mtime_ns
    assert command("--config-file", tiny_yaml, *opts) == 0
    assert (folder / "model_final.pth").stat().st_mtime_ns == before

    # stopped between the last step and its result, it is only evaluated again
    (folder / "result.json").unlink()
    assert command("--config-file", tiny_yaml, *opts) == 0
    again = json.loads((folder / "result.json").read_text())
    assert again.pop("seconds") > 0
    assert again == {key: value for key, value in result.items() if key != "seconds"}
    result = json.loads((folder / "result.json").read_text())
    log = (folder / "log.txt").read_text()
    for said in ("classes bar, square", "compared at 256 x 256 pixels", "terms against the detector's own losses"):
        assert said in log

    # its weights score the same when evaluated alone, in either form
    weights = folder / "model_final.pth"
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in torch.load(weights)["model"].items())
    assert saved_classes(folder / "model.safetensors") == ["bar", "square"]
    assert (
        command("--config-file", tiny_yaml, "--eval-only", "OUTPUT_DIR", tmp_path / "e", "MODEL.WEIGHTS", weights) == 0
    )
    alone = json.loads((tmp_path / "e" / "inference" / "result.json").read_text())
    assert alone == {key: result[key] for key in alone}
    assert {"map", "map_area", "per_class", "per_class_area", "map_by_iou", "coco", "objects"} == set(alone)
    assert command("--config-file", tiny_yaml, "--eval-only", "--resume", "OUTPUT_DIR", folder) == 0
    assert "square" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text()) == result


def test_the_checkpoint_holds_the_student_alone(tiny_yaml, tiny_teacher, tmp_path):
    cfg = make_cfg(tiny_yaml, tmp_path, *nst_opts(tiny_teacher, "fitnet+nst-poly"), "DATASETS.TEST", "()")
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth")
    plain = build_model(cfg)
    assert saved["model"].keys() == plain.state_dict().keys()
    assert not any("teacher" in key or "nst" in key or "transfer" in key for key in saved["model"])
    DetectionCheckpointer(plain).load(str(tmp_path / "model_final.pth"))
    assert all(torch.equal(value, trainer.student.state_dict()[key]) for key, value in plain.state_dict().items())
    # the adapters stand with the optimizer's state and were trained
    assert len(saved["trainer"]["adapters"]) > 0


class Stop(HookBase):
    def after_step(self):
        if self.trainer.iter == 4:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_repeats_the_undisturbed_one(tiny_yaml, tiny_teacher, tmp_path):
    opts = [*nst_opts(tiny_teacher, "kd+fitnet+nst-poly"), "DATASETS.TEST", "()"]
    opts += ["TRANSFER.AUTO_WEIGHT", "{nst-poly: 0.5}"]
    whole = make_cfg(tiny_yaml, tmp_path / "whole", *opts)
    train(whole, RunFolder(whole.OUTPUT_DIR), resume=False)

    part = make_cfg(tiny_yaml, tmp_path / "part", *opts)
    first = DistillTrainer(part)
    first.register_hooks([Stop()])
    first.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert (tmp_path / "part" / "last_checkpoint").read_text() == "model_0000002.pth"
    train(part, RunFolder(part.OUTPUT_DIR), resume=True)

    assert read_metrics(tmp_path / "part" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    one, other = (torch.load(tmp_path / name / "model_final.pth") for name in ("whole", "part"))
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    adapters = one["trainer"]["adapters"], other["trainer"]["adapters"]
    assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())
    # the weight that five steps chose, three of them before the stop
    weights = [RunFolder(tmp_path / name).result()["weights"] for name in ("whole", "part")]
    assert weights[0] == weights[1]
    assert weights[0]["kd"] == 1.0
    assert weights[0]["nst-poly"] != 50.0


def test_kd_from_a_teacher_of_other_classes_is_refused(tiny_yaml, tiny_teacher, tmp_path):
    config = tmp_path / "teacher.yaml"
    config.write_text(f"_BASE_: {tiny_teacher[0]}\nDATASETS: {{CLASSES: [square, bar]}}\n")
    with pytest.raises(UserError, match="but the student's are bar, square, the teacher's square, bar; take a teacher"):
        DistillTrainer(make_cfg(tiny_yaml, tmp_path, *nst_opts((config, tiny_teacher[1]), "kd")))


def test_methods_of_one_seed_begin_alike_and_see_the_same_batches(tiny_yaml, tiny_teacher, tmp_path):
    plain = DistillTrainer(make_cfg(tiny_yaml, tmp_path / "a"))
    taught = DistillTrainer(make_cfg(tiny_yaml, tmp_path / "b", *nst_opts(tiny_teacher)))
    other = DistillTrainer(make_cfg(tiny_yaml, tmp_path / "c", "SEED", "4"))
    state = plain.student.state_dict()
    assert all(torch.equal(value, taught.student.state_dict()[key]) for key, value in state.items())
    assert not torch.equal(
        state["roi_heads.box_head.fc1.weight"], other.student.state_dict()["roi_heads.box_head.fc1.weight"]
    )
    for one, two, three in zip(*(iter(trainer.data_loader) for trainer in (plain, taught, other)), strict=False):
        assert [item["image_id"] for item in one] == [item["image_id"] for item in two]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two))
        if [item["image_id"] for item in one] != [item["image_id"] for item in three]:
            break


def test_the_extra_keys_do_what_they_say(tiny_yaml, tmp_path):
    cfg = make_cfg(tiny_yaml, tmp_path, "SOLVER.BACKBONE_MULTIPLIER", "0.1", "SOLVER.CLIP_GRADIENTS.ENABLED", "True")
    trainer = DistillTrainer(cfg)
    assert isinstance(trainer.student.roi_heads, CanonicalROIHeads)
    assert trainer.student.roi_heads.box_pooler.canonical_box_size == 28
    assert trainer.student.roi_heads.box_pooler.canonical_level == 3
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert type(trainer.optimizer).__name__ == "AdamWWithGradientClip"
    rates = {
        name: group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
        for name, own in trainer.student.named_parameters()
        if own is parameter
    }
    assert rates["backbone.bottom_up.model.conv1.weight"] == pytest.approx(0.0002)
    assert rates["backbone.fpn_lateral2.weight"] == pytest.approx(0.002)
    assert rates["roi_heads.box_head.fc1.weight"] == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (["MODEL.WIGHTS", "x"], "unknown key MODEL.WIGHTS; did you mean MODEL.WEIGHTS"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "no such weights file"),
        (["MODEL.WEIGHTS", "backbone://nobody"], "not found"),
        (["MODEL.WEIGHTS", __file__], "not a weights file"),
        (["SOLVER.OPTIMIZER", "LION"], "SOLVER.OPTIMIZER"),
        (["DATASETS.TRAIN", "['voc_x']"], "add DATASETS.VOC.voc_x"),
        (["METHOD", "nst-poly"], "needs a teacher"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "the data has 2 classes"),
        (["SOLVER.IMS_PER_BATCH", "3", "OUTPUT_DIR", "x"], None),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(command, tiny_yaml, tmp_path, capsys, monkeypatch, opts, said):
    monkeypatch.chdir(tmp_path)
    if said is None:
        assert command("--config-file", tiny_yaml, "--num-gpus", "2", *opts) == 2
        assert "can't be shared out" in capsys.readouterr().err
        return
    assert command("--config-file", tiny_yaml, "OUTPUT_DIR", tmp_path / "run", *opts) == 2
    printed = capsys.readouterr().err.splitlines()
    assert said in printed[-1]


def test_mixed_precision_on_the_cpu_keeps_the_heads_in_float32(tiny_yaml, tiny_teacher, tmp_path, monkeypatch):
    from nst_det.detectron2 import trainer as room

    monkeypatch.setattr(room, "amp_dtype", lambda *_: torch.bfloat16)
    cfg = make_cfg(tiny_yaml, tmp_path, *nst_opts(tiny_teacher), "SOLVER.AMP.ENABLED", "True", "DATASETS.TEST", "()")
    made = DistillTrainer(cfg)
    seen = []
    made.student.backbone.bottom_up.register_forward_hook(lambda _m, _i, maps: seen.append(maps["res3"].dtype))
    made.student.proposal_generator.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]["p3"].dtype))
    made.teacher = made._whole.teacher
    made.teacher.backbone.register_forward_hook(lambda _m, _i, maps: seen.append(maps["p3"].dtype))
    made.max_iter = 1
    made.train()
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def test_detectron2s_frozen_weights_are_cast_to_the_bits_of_autocast():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    torch.manual_seed(0)
    backbone = build_backbone(cfg).eval().requires_grad_(False)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = backbone(pixels)
        cast_frozen(backbone, torch.bfloat16, (torch.nn.Conv2d, Conv2d))
        found = backbone(pixels)
    assert all(torch.equal(found[name], map_) for name, map_ in expected.items())
    assert backbone.bottom_up.stem.conv1.weight.dtype == torch.bfloat16
    assert backbone.bottom_up.stem.conv1.norm.weight.dtype == torch.float32


def test_two_processes_train_to_the_weights_of_one(command, tiny_yaml, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Nothing may depend on the share of a process: sampling is exhaustive, so that nothing is drawn; normalization is
    # frozen; the images of a batch have one size, so that none is padded; every image has the same number of
    # proposals, 40 and its two objects.
    opts = [
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "40", "MODEL.RPN.NMS_THRESH", "1.0"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
        *("MODEL.TIMM.ARCH", "resnet18", "MODEL.TIMM.NORM", "FrozenBN", "MODEL.WEIGHTS", "backbone://r18"),
        *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "3"),
        *("SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "[64]", *nst_opts(tiny_teacher)),
    ]
    for processes in (1, 2):
        words = ["--config-file", tiny_yaml, "--num-gpus", processes, "--dist-url", "auto"]
        assert command(*words, *opts, "OUTPUT_DIR", tmp_path / str(processes)) == 0
    one, two = (torch.load(tmp_path / str(processes) / "model_final.pth")["model"] for processes in (1, 2))
    begun = build_model(make_cfg(tiny_yaml, tmp_path / "x", *opts)).state_dict()
    for key, value in one.items():
        if value.is_floating_point() and "fpn" in key:
            assert not torch.equal(value, begun[key]), f"{key} was not trained"
        torch.testing.assert_close(two[key], value, rtol=0, atol=2e-5, msg=key)
    for mine, shared in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))):
        assert shared == pytest.approx(mine, rel=1e-5, abs=1e-7)
    # both evaluate all images, each once
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("1", "2")]
    assert results[0]["map"] == pytest.approx(results[1]["map"], abs=1e-6)


def test_a_user_error_in_a_process_is_one_line_too(command, tiny_yaml, monkeypatch, capsys):
    trace = "Traceback ...\n  File ...\nnst_det.errors.UserError: SOLVER.OPTIMIZER: wrong\n"

    def fail(*_, **__):
        raise ProcessRaisedException(trace, 0, 1)

    monkeypatch.setattr("nst_det.detectron2.train_net.launch", fail)
    assert command("--config-file", tiny_yaml, "--num-gpus", "2") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "nst-det: SOLVER.OPTIMIZER: wrong"


def test_a_second_start_in_another_runs_folder_is_refused(command, tiny_yaml, tmp_path, capsys):
    folder = tmp_path / "run"
    with RunFolder(folder).opened(load_config(tiny_yaml, ["OUTPUT_DIR", str(folder), "SEED", "9"])):
        pass
    assert command("--config-file", tiny_yaml, "OUTPUT_DIR", folder) == 2
    assert "holds a run with SEED 9" in capsys.readouterr().err


OWN_RESNET = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", "2"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']", "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"),
    *("MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE", "224", "MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL", "4"),
]
PLAIN = """
import sys, torch
sys.modules["nst_det"] = None  # an import of it would fail
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg).eval()
checkpointer = DetectionCheckpointer(model)
seen = []
checkpointer._log_incompatible_keys = seen.append
checkpointer.load(sys.argv[2])
with torch.no_grad():
    found = model([{"image": torch.arange(3 * 64 * 96).reshape(3, 64, 96) % 255}])[0]["instances"]
keys = seen[0].missing_keys, seen[0].unexpected_keys
torch.save({"missing": keys[0], "unexpected": keys[1], "scores": found.scores}, sys.argv[3])
"""


def test_a_plain_detectron2_loads_the_checkpoint_of_its_own_resnet(tiny_yaml, tiny_teacher, tmp_path):
    opts = [*OWN_RESNET, *nst_opts(tiny_teacher), "MODEL.WEIGHTS", "backbone://r18"]
    cfg = make_cfg(tiny_yaml, tmp_path, *opts)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    plain = get_cfg()
    plain.merge_from_list([word for key in flat(plain) for word in (key, flat(cfg)[key])])
    (tmp_path / "plain.yaml").write_text(plain.dump())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, tmp_path / "plain.yaml", tmp_path / "model_final.pth", tmp_path / "seen.pt"],
        cwd="/",
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = torch.load(tmp_path / "seen.pt")
    assert (seen["missing"], seen["unexpected"]) == ([], [])
    image = (torch.arange(3 * 64 * 96) % 255).reshape(3, 64, 96)
    with torch.no_grad():
        wanted = trainer.student.eval()([{"image": image}])[0]["instances"].scores
    torch.testing.assert_close(seen["scores"], wanted)


def test_frozen_random_layers_stop_the_run(tiny_yaml, tmp_path):
    cfg = make_cfg(tiny_yaml, tmp_path, "MODEL.TIMM.NORM", "FrozenBN")
    with pytest.raises(UserError, match="random weights"):
        DistillTrainer(cfg)
    trainer = DistillTrainer(make_cfg(tiny_yaml, tmp_path, *OWN_RESNET))
    with pytest.raises(UserError, match="stay random"):
        trainer.resume_or_load(resume=False)
