"""Questions about the device of a run, float32 on a GPU, weights cast once, and the line where a GPU fails."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nst_det.engine import device as module
from nst_det.engine.device import (
    amp_dtype,
    autocast,
    cast_frozen,
    compute_line,
    gpu_errors_in_one_line,
    many_sizes,
    named_device,
    set_cudnn_benchmark,
    set_float32_precision,
    tf32_in,
    train_depthwise_in_float32,
)
from nst_det.errors import UserError
from nst_det.losses.mmd_gpu import _as_convolutions
from nst_det.models import create_model

CPU, OLD, NEW = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def two_gpus(monkeypatch):
    """One from before Ampere, one from after; no call may ask for the GPU that happens to be the current one."""
    majors = {OLD: 7, NEW: 9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=majors[device]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")


@pytest.fixture
def torch_settings(monkeypatch):
    """Puts back what FLOAT32_PRECISION changes."""
    monkeypatch.setattr(module, "_found", [])
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def amp(dtype):
    return CfgNode({"ENABLED": True, "DTYPE": dtype})


@pytest.mark.parametrize("fast", [False, True])
def test_precision_is_that_of_the_device_which_computes(two_gpus, monkeypatch, fast):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast, raising=False)
    found = [amp_dtype(amp("auto"), device) for device in (CPU, OLD, NEW)]
    assert found == [torch.bfloat16 if fast else None, None, torch.bfloat16]
    assert amp_dtype(amp("fp16"), OLD) == torch.float16
    with pytest.raises(UserError, match="SOLVER.AMP.DTYPE: fp16 needs a GPU"):
        amp_dtype(amp("fp16"), CPU)


@pytest.mark.parametrize(
    ("name", "products", "convolutions"),
    [("highest", False, False), ("high", True, True), ("medium", True, True), ("", False, True)],
)
def test_float32_is_the_same_in_products_and_convolutions(torch_settings, name, products, convolutions):
    set_float32_precision(name, NEW)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (products, convolutions)
    # what torch itself reads; where its two ways to say this were mixed it raises
    if hasattr(torch.backends, "fp32_precision"):
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == convolutions


def test_a_run_without_a_precision_has_what_was_before_the_runs_of_this_process(torch_settings):
    for name in ("highest", "high", ""):
        set_float32_precision(name, NEW)
    assert tf32_in() == {"convolutions": True, "matrix products": False}
    torch.backends.cuda.matmul.allow_tf32 = True
    # what a user sets after that is the user's
    set_float32_precision("", NEW)
    assert tf32_in() == {"convolutions": True, "matrix products": True}


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older switches alone")
def test_a_user_may_set_tf32_by_the_newer_switches(torch_settings, two_gpus):
    torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert compute_line(NEW, None).count("TF32") == 2
    with _as_convolutions(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)):
        assert tf32_in()["matrix products"]
    set_float32_precision("highest", NEW)
    assert compute_line(NEW, None).count("TF32") == 0
    set_float32_precision("", NEW)
    assert compute_line(NEW, None).count("TF32") == 2


def test_on_the_cpu_float32_is_float32(torch_settings):
    before = torch.get_float32_matmul_precision()
    set_float32_precision("medium", CPU)
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(UserError, match="FLOAT32_PRECISION: .*'low'"):
        set_float32_precision("low", CPU)


class Standardized(nn.Conv2d):
    """A convolution that computes with its weights before it convolves, in the precision that they have."""

    def forward(self, x):
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), None)


class Gradients(TorchDispatchMode):
    """Notes the precision in which the gradients of each convolution are computed, by the shape of its weights."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.seen[tuple(args[2].shape)] = {args[0].dtype, args[1].dtype, args[2].dtype}
        return function(*args, **(kwargs or {}))


# padded by timm as TensorFlow does, in a function of its own
@pytest.mark.parametrize("arch", ["mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_depthwise_convolutions_on_the_cpu_learn_in_float32(arch):
    torch.manual_seed(0)
    plain = create_model(arch, 5).train().to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    train_depthwise_in_float32(model)
    # once is as twice, and a copy's layers are its own
    train_depthwise_in_float32(model)
    model = copy.deepcopy(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with Gradients() as gradients, autocast(CPU, torch.bfloat16):
        model(x).sum().backward()
    kinds = {shape[1] == 1 and shape[0] > 1: kinds for shape, kinds in gradients.seen.items()}
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    assert all(layer.weight.grad is not None for layer in model.modules() if isinstance(layer, nn.Conv2d))
    # without gradients, and in float32, nothing changes
    model, plain = copy.deepcopy(model).eval(), copy.deepcopy(plain).eval()
    model.load_state_dict(plain.state_dict())
    for dtype in (torch.bfloat16, None):
        with torch.no_grad(), autocast(CPU, dtype):
            assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), plain(x))


def test_gradients_of_a_depthwise_convolution_are_those_of_float64():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 12, 3, padding=1, groups=6), torch.randn(2, 6, 5, 5, requires_grad=True)
    exact, y = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact(y).square().sum().backward()
    train_depthwise_in_float32(layer)
    with autocast(CPU, torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # the loss in float32: of what is rounded, the outputs and their gradients, each is off by 2 ** -9 at most
    out.float().square().sum().backward()
    for found, expected in ((layer.weight.grad, exact.weight.grad), (x.grad, y.grad)):
        assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("arch", ["nst_resnet10_w32", "mobilenetv3_small_050"])
def test_weights_cast_once_give_the_bits_of_autocast(arch, channels_last):
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 3, 3, padding=1), create_model(arch, 5)).eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    with autocast(CPU, torch.bfloat16):
        expected = model(x)
        cast_frozen(model, None)
        assert {item.dtype for item in model.parameters()} == {torch.float32}
        cast_frozen(model, torch.bfloat16)
        assert torch.equal(model(x), expected)
    for layer in model.modules():
        cast = type(layer) in (nn.Conv2d, nn.Linear)
        assert {item.dtype for item in layer.parameters(recurse=False)} <= {torch.bfloat16 if cast else torch.float32}


@pytest.mark.parametrize(("wanted", "device"), [(True, NEW), (False, NEW), (True, CPU)])
def test_cudnn_tries_its_kernels_on_a_gpu_that_trains(monkeypatch, two_gpus, wanted, device):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_cudnn_benchmark(wanted, device)
    tries = wanted and device != CPU
    assert torch.backends.cudnn.benchmark == tries
    assert ("cuDNN" in compute_line(device, None)) == tries

    @many_sizes()
    def evaluate():
        assert not torch.backends.cudnn.benchmark
        raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert torch.backends.cudnn.benchmark == tries


def test_the_first_line_says_what_computes(two_gpus, torch_settings):
    set_float32_precision("highest", OLD)
    line = compute_line(OLD, None, 4, mixed=True)
    assert line.startswith("cuda:0 (GPU of cuda:0): forward pass in float32 (this device is not fast in bf16), ")
    assert line.endswith("4 loader workers")
    assert (line.count("in float32"), line.count("TF32")) == (3, 0)
    set_float32_precision("high", NEW)
    line = compute_line(NEW, torch.bfloat16)
    assert line.startswith("cuda:1 (GPU of cuda:1): forward pass in bf16, ")
    assert (line.count("TF32"), "workers" in line) == (2, False)
    assert compute_line(CPU, None, 0).endswith("): forward pass in float32, 0 loader workers")


FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which\n1 GiB is free."
)
WRAPPED = "Caught RuntimeError in pin memory thread.\nTraceback\nCUDA error: an illegal memory access\nx"


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (torch.cuda.OutOfMemoryError(FULL), "CUDA out of memory. Tried to allocate 20.00 GiB; free its memory"),
        (RuntimeError("CUDA error: out of memory\nfor debugging"), "CUDA error: out of memory; free its memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "lower X"),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "CUDA_VISIBLE_DEVICES"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "CUDA_VISIBLE_DEVICES"),
        (RuntimeError("No CUDA GPUs are available"), "CUDA_VISIBLE_DEVICES"),
        (
            getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)(WRAPPED),
            "CUDA error: an illegal memory access; see nvidia-smi",
        ),
    ],
)
def test_a_gpu_that_fails_is_one_line(error, part):
    with pytest.raises(UserError) as ended, gpu_errors_in_one_line("lower X", lambda: "as before"):
        raise error
    line = str(ended.value)
    assert part in line
    assert line.endswith("; as before")
    assert ended.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ: CUDA"), ValueError("CUDA"), UserError("CUDA error")])
def test_what_is_no_fault_of_a_gpu_stays_what_it_is(error):
    with pytest.raises(type(error)) as ended, gpu_errors_in_one_line("lower X"):
        raise error
    assert ended.value is error


def test_a_device_that_cannot_be_used_is_named_with_the_reason(monkeypatch):
    def busy(*_, **__):
        raise RuntimeError("CUDA error: busy\nmore")

    monkeypatch.setattr(torch, "empty", busy)
    with pytest.raises(UserError, match=r"--device: 'cuda:1' .*CUDA error: busy\)"):
        named_device("cuda:1")
