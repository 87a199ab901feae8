import logging

import torch

from nst_det.benchmark import Batched, benchmark
from nst_det.comparison.cost import COST_FILE, architecture, measure_costs
from nst_det.comparison.plan import Run
from nst_det.detection.checkpoint import save_weights
from nst_det.detection.config import load_detect_config
from nst_det.detection.torchvision import build_detector

CLASSES = ("cup", "hat")
KEYS = ("ENGINE", "torchvision", "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.TIMM.NORM", "BN",
        "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96")  # fmt: skip


def make_config(pytestconfig, *keys):
    return load_detect_config(pytestconfig.rootpath / "configs" / "detect" / "small_cpu.yaml", [*KEYS, *keys])


def finished_run(folder, config):
    """A folder as train-det leaves it, with a detector that was not trained."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump())
    save_weights(folder / "model.safetensors", build_detector(config, 0), CLASSES)


def detector_run(tmp_path, row):
    folder = tmp_path / "detect" / "seed0" / row
    return Run(f"detect/seed0/{row}", "detector", (), (folder / "result.json",), {}, row=row)


def test_rows_of_one_architecture_share_one_measurement(tmp_path, pytestconfig, caplog):
    plain = make_config(pytestconfig)
    wide = make_config(pytestconfig, "MODEL.FPN.OUT_CHANNELS", "32")
    runs = [detector_run(tmp_path, row) for row in ("scratch", "ce", "wide", "gone")]
    configs = dict(zip((run.name for run in runs), (plain, plain, wide, make_config(pytestconfig))))
    # a detector of another architecture, of which nothing is left
    configs["detect/seed0/gone"] = make_config(pytestconfig, "MODEL.ROI_BOX_HEAD.FC_DIM", "24")
    for run in runs[:3]:
        finished_run(run.folders[0], configs[run.name])
    with caplog.at_level(logging.WARNING):
        costs = measure_costs(runs, configs, tmp_path)
    assert list(costs) == ["scratch", "ce", "wide"]
    assert costs["scratch"] is costs["ce"]
    assert [cost.run for cost in costs.values()] == ["detect/seed0/ce", "detect/seed0/ce", "detect/seed0/wide"]
    assert "no latency of detect/seed0/gone" in caplog.text
    # 4:3 with a long side of at most 96
    assert costs["ce"].size == (64, 85)
    alone = benchmark(Batched(build_detector(wide, 0).eval()), (64, 85), [], 0, torch.device("cpu"))
    assert (costs["wide"].macs, costs["wide"].parameters) == (alone["macs"], alone["parameters"])
    assert costs["wide"].parameters != costs["ce"].parameters
    latency = costs["ce"].latency
    assert 0 < latency.p10 <= latency.median <= latency.p90
    assert costs["ce"].machine
    before = (tmp_path / COST_FILE).read_bytes()
    again = measure_costs(runs[:3], configs, tmp_path)
    assert again == costs
    assert (tmp_path / COST_FILE).read_bytes() == before


def test_what_makes_an_architecture(pytestconfig):
    plain = architecture(make_config(pytestconfig))
    for keys in (("MODEL.WEIGHTS", "other.safetensors"), ("SOLVER.MAX_ITER", "7"), ("SEED", "3"), ("OUTPUT_DIR", "x")):
        assert architecture(make_config(pytestconfig, *keys)) == plain, keys
    for keys in (("MODEL.TIMM.ARCH", "nst_resnet18_w48"), ("INPUT.MIN_SIZE_TEST", "48")):
        assert architecture(make_config(pytestconfig, *keys)) != plain, keys
