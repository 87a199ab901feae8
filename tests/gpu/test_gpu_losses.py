"""Every transfer term on the GPU against the same on the CPU, forward and backward."""

import pytest
import torch

from nst_det.losses import ModelOutputs, build_transfer
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
        difference = (ours[name] - value).norm() / value.norm()
        assert difference < 1e-4, name
