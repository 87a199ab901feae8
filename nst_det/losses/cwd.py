"""CWD: where each channel looks, as a distribution over positions (Shu et al. 2021, arXiv 2011.13256)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import (
    Shared,
    at_size,
    channel_adapter,
    check_maps,
    check_temperature,
    common_size,
    compute_now,
    teacher_at,
)
from nst_det.losses.registry import LayerPair, register_term


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, shared: Shared = compute_now) -> Tensor:
    """``tau^2 / (B C) sum KL(softmax(t / tau) || softmax(s / tau))`` with the softmax over the positions of a channel.

    Maps are (B, C, H, W) and (B, C, H', W'), the larger one is averaged down; tau is the ``temperature``.  A scalar
    >= 0 that doesn't change when a constant is added to a channel.  No gradient goes to the teacher; ``shared`` keeps
    its part for other students.
    """
    check_maps(student, teacher, same_channels=True)
    size = common_size(student, teacher)

    def log_distribution(maps: Tensor) -> Tensor:
        return F.log_softmax(maps.flatten(2) / temperature, 2)

    target = shared(("cwd", temperature, size), lambda: log_distribution(teacher_at(size, teacher, shared)))
    divergence = F.kl_div(log_distribution(at_size(student, size)), target, reduction="sum", log_target=True)
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


@register_term(
    "cwd",
    level="maps",
    weight=10.0,
    source="mmrazor, Faster R-CNN on FPN p2..p6 (10 a level, tau 1)",
    summary="where each channel looks",
)
class CWD(nn.Module):
    """The term ``cwd``; a 1x1 convolution on the student where the channel counts differ."""

    reads = ("cwd",)

    def __init__(self, pair: LayerPair, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature("cwd", temperature)
        self.temperature = temperature
        self.adapter = channel_adapter(pair.student_channels, pair.teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        check_maps(student, teacher)
        small = at_size(student, common_size(student, teacher))
        return cwd_loss(self.adapter(small), teacher, self.temperature, shared)
