"""Every transfer term on the GPU against the same on the CPU, forward and backward."""

import pytest
import torch

from nst_det.losses import ModelOutputs, build_transfer, nst_loss
from nst_det.losses.mmd import KERNELS
from nst_det.losses.registry import terms

pytestmark = pytest.mark.gpu
STUDENT, TEACHER, CLASSES = 24, 32, 10


def outputs(channels, side, seed, device):
    draw = torch.Generator().manual_seed(seed)
    kinds = {
        "logits": torch.randn(8, CLASSES, generator=draw),
        "map": torch.randn(8, channels, side, side, generator=draw).relu(),
        "embedding": torch.randn(8, channels, generator=draw),
    }
    leaves = {name: value.to(device).requires_grad_() for name, value in kinds.items()}
    boxes = [torch.tensor([[0.1, 0.2, 0.5, 0.9]], device=device)] * 8
    return leaves, ModelOutputs(
        leaves["logits"], {"res4": leaves["map"]}, leaves["embedding"], torch.arange(8, device=device), boxes
    )


def value_and_gradients(term, device):
    torch.manual_seed(0)
    # pkd compares channel by channel
    teacher = STUDENT if term == "pkd" else TEACHER
    loss = build_transfer(
        f"{term}:1",
        levels=["res4"],
        student_channels={"res4": STUDENT},
        teacher_channels={"res4": teacher},
        num_classes=CLASSES,
        student_embedding=STUDENT,
        teacher_embedding=teacher,
        # its mask is drawn on the device
        options={"mgd": {"masked": 0.0}},
    ).to(device)
    leaves, student = outputs(STUDENT, 7, 1, device)
    value = loss(student, outputs(teacher, 14, 2, device)[1])[term]
    value.backward()
    gradients = {name: item.grad for name, item in [*leaves.items(), *loss.named_parameters()] if item.grad is not None}
    assert gradients
    assert {item.device.type for item in gradients.values()} == {torch.device(device).type}
    return {"value": value.detach().cpu(), **{name: item.cpu() for name, item in gradients.items()}}


@pytest.mark.parametrize("term", list(terms()))
def test_a_term_equals_that_of_the_cpu(term, gpu_device):
    assert torch.get_float32_matmul_precision() == "highest"
    ours, wanted = value_and_gradients(term, gpu_device), value_and_gradients(term, "cpu")
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        # some are 0 in both, behind layers that begin with 0
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("kernel", KERNELS)
# over positions and over channels, and a long sum in slices
@pytest.mark.parametrize("shape", [(8, 64, 128, 7, 7), (2, 64, 96, 84, 50), (2, 64, 64, 200, 100)])
@pytest.mark.parametrize("tf32", [True, False])
def test_nst_of_bfloat16_maps_is_as_exact_as_they_are(kernel, shape, tf32, gpu_device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    draw = torch.Generator().manual_seed(0)
    b, s, t, height, width = shape
    maps = [torch.randn(b, c, height, width, generator=draw).relu().bfloat16() for c in (s, t)]
    found = []
    for device, dtype in ((gpu_device, torch.bfloat16), ("cpu", torch.float64)):
        student, teacher = (x.to(device, dtype).contiguous(memory_format=torch.channels_last) for x in maps)
        value = nst_loss(student.requires_grad_(), teacher, kernel, few_launches=True)
        (gradient,) = torch.autograd.grad(value, student)
        found.append((value.detach().cpu().double(), gradient.cpu().double()))
    (value, gradient), (exact, exact_gradient) = found
    assert abs(value - exact) < 2e-4 * max(float(exact), 0.1)
    assert (gradient - exact_gradient).norm() < 4e-3 * exact_gradient.norm()
    assert not torch.backends.cuda.matmul.allow_tf32
