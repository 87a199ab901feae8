"""KD: the teacher's softened class probabilities (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, compute_now, full_precision
from nst_det.losses.registry import LayerPair, LossSpec, register_term


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, shared: Shared = compute_now) -> Tensor:
    """``T^2 * KL(softmax(z_T / T) || softmax(z_S / T))``, mean over the batch.

    Args:
        student: logits (B, K).
        teacher: logits (B, K); no gradient goes there.
        temperature: T > 0.
        shared: keeps the teacher's soft targets for other students.

    Returns:
        A scalar >= 0, 0 where both distributions agree.

    Raises:
        ValueError: the two have different numbers of classes.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"kd compares logits of one shape; got {tuple(student.shape)} and {tuple(teacher.shape)}")
    target = shared(("kd", temperature), lambda: F.log_softmax(full_precision(teacher.detach()) / temperature, dim=1))
    log_probability = F.log_softmax(full_precision(student) / temperature, dim=1)
    # a batch of RoIs can be empty, and has the value 0 then
    return F.kl_div(log_probability, target, reduction="sum", log_target=True) / max(len(student), 1) * temperature**2


class KD(nn.Module):
    """The term ``kd``."""

    reads = ("kd",)

    def __init__(self, pair: LayerPair, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"kd: temperature must be above 0, not {temperature}")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        """Logits (B, K) of both to a scalar."""
        return kd_loss(student, teacher, self.temperature, shared)


register_term(
    LossSpec(
        name="kd",
        level="logits",
        weight=1.0,
        source="ours: 1 on T^2 KL at T=4 has the gradient of the NST paper's 16 on the soft cross-entropy",
        summary="the teacher's softened class probabilities",
        build=KD,
        options={"temperature": 4.0},
    )
)
