"""The trainer and the command, on a data set small enough for a test."""

import itertools
import json
import shutil

import pytest
import torch

pytest.importorskip("detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import HookBase
from detectron2.layers import Conv2d
from detectron2.modeling import build_backbone, build_model
from safetensors.torch import load_file

from nst_det.detection.checkpoint import saved_classes
from nst_det.detectron2 import DistillTrainer
from nst_det.detectron2 import trainer as room
from nst_det.detectron2.modeling import CanonicalROIHeads
from nst_det.detectron2.train_net import train as train_net
from nst_det.engine.config import flat
from nst_det.engine.device import cast_frozen
from nst_det.engine.io import read_json
from nst_det.engine.metrics import read_metrics
from nst_det.engine.run_dir import RunFolder


def test_the_command_leaves_a_run_folder(train, taught, tmp_path, capsys):
    folder = tmp_path / "run"
    words = [*taught(), "TRANSFER.WARMUP_ITERS", 2]
    assert train(folder, *words, test=True) == 0
    result = read_json(folder / "result.json")
    assert set(result["per_class"]) == {"bar", "square"}
    assert 0 <= result["map"] <= 1
    assert (result["engine"], result["steps"], result["seed"], result["method"]) == ("detectron2", 6, 3, "nst-poly")
    detector = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(result["losses"]) == {*detector, "loss_transfer_nst-poly"}
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    # the weight rises over two steps, and Detectron2's own events have the term too
    assert 0 < rows[0]["loss_transfer_nst-poly"] < rows[1]["loss_transfer_nst-poly"]
    events = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert any("loss_transfer_nst-poly" in event for event in events)
    # so do they have its speed, which is told with the last step of this short run
    *others, timed = read_metrics(folder / "metrics.jsonl", speed=True)
    assert result["speed"] == {name: timed[f"speed/{name}"] for name in ("images_per_second", "data_wait")}
    assert result["speed"]["images_per_second"] > 0
    assert 0 < result["speed"]["data_wait"] < 1
    assert not any(key.startswith("speed") for row in others for key in row)
    assert all(any(f"speed/{name}" in event for event in events) for name in result["speed"])
    assert {"image_id", "category", "bbox", "score"} == set(read_json(folder / "detections.json")[0])
    log = (folder / "log.txt").read_text()
    for line in ("classes bar, square", "compared at ", "terms against the detector's own losses"):
        assert line in log

    # what is done is not done again; stopped between the last step and its result, it is only evaluated again
    weights = folder / "model_final.pth"
    before = weights.stat().st_mtime_ns
    assert train(folder, *words, test=True) == 0
    (folder / "result.json").unlink()
    assert train(folder, *words, test=True) == 0
    assert weights.stat().st_mtime_ns == before
    again = read_json(folder / "result.json")
    assert again.pop("seconds") > 0
    assert again == {key: value for key, value in result.items() if key != "seconds"}

    # its weights score the same when evaluated alone, in either form
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in torch.load(weights)["model"].items())
    assert saved_classes(folder / "model.safetensors") == ["bar", "square"]
    result = read_json(folder / "result.json")
    assert train(tmp_path / "e", "MODEL.WEIGHTS", weights, flags=["--eval-only"], test=True) == 0
    alone = read_json(tmp_path / "e" / "inference" / "result.json")
    assert alone == {key: result[key] for key in alone}
    keys = "map map_area per_class per_class_area map_by_iou coco objects objects_per_class"
    assert set(keys.split()) == set(alone)
    mixed = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bf16", "TEST.AMP", True, "MODEL.WEIGHTS", weights)
    assert train(tmp_path / "amp", *mixed, flags=["--eval-only"], test=True) == 0
    one, other = (read_json(tmp_path / name / "inference" / "detections.json") for name in ("e", "amp"))
    assert one != other
    assert train(folder, flags=["--eval-only", "--resume"], test=True) == 0
    assert "square" in capsys.readouterr().out
    assert read_json(folder / "result.json") == result


def test_a_run_is_evaluated_where_it_was_moved_with_its_data(cli, train, voc_root, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(voc_root, home / "voc")
    data = {name: {"ROOT": str(home / "voc"), "SPLIT": name[5:]} for name in ("tiny_train", "tiny_test")}
    assert train(home / "run", "DATASETS.VOC", data, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "[]") == 0
    moved = home.rename(tmp_path / "moved") / "run"
    words = ["--eval-only", "--resume", "OUTPUT_DIR", moved, "DATASETS.TEST", "[tiny_test]"]
    assert cli("train-det", "--config-file", moved / "config.yaml", *words) == 0
    assert "map" in read_json(moved / "inference" / "result.json")


class Stop(HookBase):
    def after_step(self):
        if self.trainer.iter == 4:
            raise KeyboardInterrupt


def test_a_resumed_run_repeats_the_undisturbed_one(configured, taught, tmp_path):
    words = [*taught("kd+fitnet+nst-poly"), "DATASETS.TEST", "()", "TRANSFER.AUTO_WEIGHT", "{nst-poly: 0.5}"]
    words += ["INPUT.AUGMENTATION", "voc"]
    whole, part = (configured(*words, folder=tmp_path / name) for name in ("whole", "part"))
    train_net(whole, RunFolder(whole.OUTPUT_DIR), resume=False)
    first = DistillTrainer(part)
    first.register_hooks([Stop()])
    first.resume_or_load(resume=False)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert (tmp_path / "part" / "last_checkpoint").read_text() == "model_0000002.pth"
    train_net(part, RunFolder(part.OUTPUT_DIR), resume=True)

    assert read_metrics(tmp_path / "part" / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    one, other = (torch.load(tmp_path / name / "model_final.pth") for name in ("whole", "part"))
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    adapters = one["trainer"]["adapters"], other["trainer"]["adapters"]
    assert len(adapters[0]) > 0
    assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())
    # the weight that five steps chose, three of them before the stop
    weights = [RunFolder(tmp_path / name).result()["weights"] for name in ("whole", "part")]
    assert weights[0] == weights[1]
    assert weights[0]["kd"] == 1.0
    assert weights[0]["nst-poly"] != 50.0


def test_methods_of_one_seed_begin_alike_and_see_the_same_batches(configured, taught):
    plain, other = DistillTrainer(configured()), DistillTrainer(configured("SEED", 4))
    learning = DistillTrainer(configured(*taught()))
    states = [trainer.student.state_dict() for trainer in (plain, learning, other)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(*(state["roi_heads.box_head.fc1.weight"] for state in (states[0], states[2])))
    loaders, differ = [itertools.islice(trainer.data_loader, 8) for trainer in (plain, learning, other)], False
    for one, two, three in zip(*loaders, strict=True):
        assert [item["image_id"] for item in one] == [item["image_id"] for item in two]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two))
        differ |= [item["image_id"] for item in one] != [item["image_id"] for item in three]
    assert differ


def test_the_added_keys_are_followed(configured):
    trainer = DistillTrainer(configured("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.CLIP_GRADIENTS.ENABLED", True))
    assert isinstance(trainer.student.roi_heads, CanonicalROIHeads)
    assert trainer.student.roi_heads.box_pooler.canonical_box_size == 28
    assert trainer.student.roi_heads.box_pooler.canonical_level == 3
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert type(trainer.optimizer).__name__ == "AdamWWithGradientClip"
    names = {parameter: name for name, parameter in trainer.student.named_parameters()}
    groups = trainer.optimizer.param_groups
    rates = {names[parameter]: group["initial_lr"] for group in groups for parameter in group["params"]}
    assert rates["backbone.bottom_up.model.conv1.weight"] == pytest.approx(0.0002)
    assert rates["backbone.fpn_lateral2.weight"] == pytest.approx(0.002)
    assert rates["roi_heads.box_head.fc1.weight"] == pytest.approx(0.002)


@pytest.mark.parametrize("evaluates", [False, True])
def test_mixed_precision_on_the_cpu_keeps_the_heads_in_float32(configured, taught, monkeypatch, evaluates):
    monkeypatch.setattr(room, "amp_dtype", lambda *_: torch.bfloat16)
    words = ["SOLVER.AMP.ENABLED", True, "TEST.AMP", evaluates, "DATASETS.TEST", "()"]
    made = DistillTrainer(configured(*taught(), *words))
    seen = []
    made.student.backbone.bottom_up.register_forward_hook(lambda _m, _i, maps: seen.append(maps["res3"].dtype))
    made.student.proposal_generator.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]["p3"].dtype))
    made.distilled.teacher.backbone.register_forward_hook(lambda _m, _i, maps: seen.append(maps["p3"].dtype))
    made.max_iter = 1
    made.train()
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    with torch.no_grad():
        made.student.eval().backbone(torch.zeros(1, 3, 64, 64))
    assert seen[3:] == [torch.bfloat16 if evaluates else torch.float32]


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


OWN_RESNET = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", "2"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "False"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']", "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()"),
    *("MODEL.ROI_BOX_HEAD.CANONICAL_BOX_SIZE", "224", "MODEL.ROI_BOX_HEAD.CANONICAL_LEVEL", "4"),
]


@pytest.mark.parametrize("resnet", [[], [*OWN_RESNET, "MODEL.WEIGHTS", "backbone://r18"]], ids=["timm's", "own"])
def test_the_checkpoint_holds_the_student_alone(configured, taught, plain_detectron2, tmp_path, resnet):
    cfg = configured(*taught("fitnet+nst-poly"), "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2, *resnet)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    weights = tmp_path / "run" / "model_final.pth"
    model = build_model(cfg)
    assert torch.load(weights)["model"].keys() == model.state_dict().keys()
    DetectionCheckpointer(model).load(str(weights))
    assert all(torch.equal(value, trainer.student.state_dict()[key]) for key, value in model.state_dict().items())
    if resnet:
        plain = get_cfg()
        plain.merge_from_list([word for key in flat(plain) for word in (key, flat(cfg)[key])])
        (tmp_path / "plain.yaml").write_text(plain.dump())
        images = (torch.arange(3 * 64 * 96) % 255.0).reshape(1, 3, 64, 96)
        seen = plain_detectron2(tmp_path / "plain.yaml", weights, images)
        assert (seen["missing"], seen["unexpected"]) == ([], [])
        with torch.no_grad():
            wanted = trainer.student.eval()([{"image": images[0]}])[0]["instances"].scores
        torch.testing.assert_close(seen["scores"], wanted)


def test_two_processes_train_to_the_weights_of_one(train, configured, taught, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Nothing may depend on the share of a process: sampling is exhaustive, so that nothing is drawn; normalization is
    # frozen; the images of a batch have one size, so that none is padded; every image has the same number of
    # proposals, 40 and its two objects.
    words = [
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "MODEL.RPN.POSITIVE_FRACTION", "1.0"),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "40", "MODEL.RPN.NMS_THRESH", "1.0"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "1.0"),
        *("MODEL.TIMM.ARCH", "resnet18", "MODEL.TIMM.NORM", "FrozenBN", "MODEL.WEIGHTS", "backbone://r18"),
        *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "3"),
        *("SOLVER.STEPS", "()", "INPUT.MIN_SIZE_TRAIN", "[64]", *taught()),
    ]
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        assert train(folder, *words, flags=["--num-gpus", processes, "--dist-url", "auto"], test=True) == 0
    one, two = (torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("1", "2"))
    begun = build_model(configured(*words)).state_dict()
    for key, value in one.items():
        if value.is_floating_point() and "fpn" in key:
            assert not torch.equal(value, begun[key]), f"{key} was not trained"
        torch.testing.assert_close(two[key], value, rtol=0, atol=2e-5, msg=key)
    alone, together = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))
    assert alone
    for mine, shared in zip(alone, together, strict=True):
        assert shared == pytest.approx(mine, rel=1e-5, abs=1e-7)
    # both evaluate all images, each once
    results = [read_json(tmp_path / name / "result.json") for name in ("1", "2")]
    assert results[0]["map"] == pytest.approx(results[1]["map"], abs=1e-6)
