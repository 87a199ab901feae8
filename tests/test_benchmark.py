import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nst_det.benchmark import WARMUP, benchmark, count_arithmetic

CHECKOUT = Path(__file__).resolve().parents[1]


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16 * 6 * 5, 10),
    ).eval()


def test_arithmetic_equals_a_hand_count():
    found = count_arithmetic(small_net(), torch.zeros(3, 3, 12, 10))
    # of the whole batch: two convolutions and the linear layer
    macs = 3 * (12 * 10 * 8 * (3 * 9) + 6 * 5 * 16 * (4 * 9) + 16 * 6 * 5 * 10)
    assert found == {"macs": macs, "flops": 2 * macs}


NETWORKS = [
    *("resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
    *("mobilevit_xxs", "pvt_v2_b0", "convnext_atto", "efficientnet_lite0"),
    *("regnety_002", "xcit_nano_12_p16_224", "edgenext_xx_small", "ghostnet_100"),
]
# networks whose weights are for one size of image
SIZED = ("vit", "swin")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("arch", NETWORKS)
def test_arithmetic_is_that_of_torchs_counter_without_weights(arch, fused, monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 2 if fused else 0)
    side = {"img_size": 112} if arch.startswith(SIZED) else {}
    model, images = timm.create_model(arch, **side).eval(), torch.zeros(1, 3, 112, 112)
    macs = count_arithmetic(model, images)["macs"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(images.to("meta"))
    assert macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_large", "swin_t", "vit_b_16", "convnext_tiny"])
def test_arithmetic_is_what_torchvision_publishes(arch):
    with torch.device("meta"):
        model, images = torchvision.models.get_model(arch).eval(), torch.zeros(1, 3, 224, 224)
    published = torchvision.models.get_model_weights(arch).IMAGENET1K_V1.meta["_ops"]
    assert count_arithmetic(model, images)["macs"] / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_hand(fused, monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 2 if fused else 0)
    # 14 x 14 patches and a class token, of width 192 in 12 blocks; keys and values of a block are as many as queries
    tokens, width = 14 * 14 + 1, 192
    block = tokens * (3 + 1 + 4 + 4) * width**2 + 2 * tokens**2 * width
    by_hand = 14 * 14 * (3 * 16**2) * width + 12 * block + 1000 * width
    assert count_arithmetic(timm.create_model(NETWORKS[2]).eval(), torch.zeros(1, 3, 224, 224))["macs"] == by_hand
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    assert count_arithmetic(Attends(layer), torch.zeros(3, 10, 8))["macs"] == 3 * (4 * 10 * 8**2 + 2 * 10**2 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


class Attends(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x)[0]


def test_percentiles_with_a_clock_that_is_not_real(monkeypatch):
    # passes that take 1 .. 11 seconds, out of order: 10 % of the way is 2, the middle 6, 90 % is 10
    durations = [7, 1, 11, 3, 5, 2, 9, 4, 10, 6, 8]
    now, left = [0.0], [1000] * WARMUP + durations

    class Net(nn.Module):
        def forward(self, images):
            # the pass that counts operations is the last
            now[0] += left.pop(0) if left else 0
            return images

    monkeypatch.setattr("nst_det.benchmark.time.perf_counter", lambda: now[0])
    (row,) = benchmark(Net(), (12, 10), [4], len(durations), torch.device("cpu"))["latency"]
    assert row == {"batch": 4, "repeats": 11, "p10": 2.0, "median": 6.0, "p90": 10.0, "images_per_second": 4 / 6}
    assert not left


def test_the_network_sees_the_asked_batches(monkeypatch):
    monkeypatch.setattr("nst_det.benchmark.WARMUP_SECONDS", 0.0)
    seen = []
    net = small_net()
    net.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    figures = benchmark(net, (12, 10), [1, 3], repeats=2, device=torch.device("cpu"))
    assert figures["parameters"] == 3 * 8 * 9 + 8 + 16 + 16 * 4 * 9 + 480 * 10 + 10
    assert [row["batch"] for row in figures["latency"]] == [1, 3]
    assert seen.count((3, 3, 12, 10)) == WARMUP + 2
    for row in figures["latency"]:
        assert 0 < row["p10"] <= row["median"] <= row["p90"]
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["median"])


def test_a_backbone_by_its_name(cli, tmp_path, capsys):
    file = tmp_path / "out.json"
    words = ["--arch", "nst_resnet10_w32", "--size", "64", "--batch", "1", "2", "--repeats", "2", "--device", "cpu"]
    assert cli("benchmark", *words, "--json", file) == 0
    figures = json.loads(file.read_text())
    printed = capsys.readouterr().out
    # the stem by hand: 3 x 3 on 3 channels to 32, stride 2, at 64 pixels
    stem = 32 * 32 * 32 * 27
    blocks = 0
    side, before = 16, 32
    for width in (32, 64, 128, 256):
        side = side if width == 32 else side // 2
        blocks += side * side * (9 * before * width + 9 * width * width + (before * width if width != before else 0))
        before = width
    assert figures["macs"] == stem + blocks + 256 * 1000
    assert figures["size"] == [64, 64]
    assert "MACs" in printed
    assert "papers often print MACs as FLOPs" in printed


def test_a_detector_by_its_config(cli, tmp_path):
    config = CHECKOUT / "configs" / "detect" / "small_cpu.yaml"
    file = tmp_path / "out.json"
    words = ["--config-file", config, "--batch", "1", "--repeats", "1", "--size", "64x96", "--device", "cpu"]
    keys = ["ENGINE", "torchvision", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    assert cli("benchmark", *words, "--json", file, *keys) == 0
    figures = json.loads(file.read_text())
    assert figures["size"] == [64, 96]
    # bottom-up and FPN at least: p2's output convolution alone is 64 x 64 x 9 at 16 x 24
    assert figures["macs"] > 64 * 64 * 9 * 16 * 24
    assert 1e6 < figures["parameters"] < 3e6


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--arch", "resnet19"], "resnet19"),
        (["--weights", "backbone://nothing-here"], "backbone://nothing-here"),
        (["--run", "no/run"], "no/run"),
        (["--arch", "resnet18", "--batch", "0"], "--batch"),
        (["--arch", "resnet18", "X", "1"], "--config-file"),
        *((["--arch", "resnet18", "--size", size], "--size") for size in ("224x", "a", "0", "240x320x3", "99999")),
    ],
)
def test_bad_input_is_one_line(cli, words, named, capsys):
    assert cli("benchmark", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_gpu_that_is_full_is_one_line(monkeypatch, capsys, cli):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")

    monkeypatch.setattr("nst_det.benchmark.count_arithmetic", full)
    assert cli("benchmark", "--arch", "nst_resnet10_w32", "--size", "64", "--batch", "64", "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert out.startswith("cpu (")
    assert "--batch" in err
    assert len(err.splitlines()) == 1
