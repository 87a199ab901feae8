"""DKD: the target class and the others, each by itself (Zhao et al. 2022, arXiv 2203.08679)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.kd import soft_targets
from nst_det.losses.ops import Shared, check_factors, check_temperature, compute_now, full_precision
from nst_det.losses.registry import LayerPair, register_term


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    target: float = 1.0,
    others: float = 0.5,
    temperature: float = 1.0,
    shared: Shared = compute_now,
) -> Tensor:
    """``T^2 (target KL(b_T || b_S) + others KL(q_T || q_S))`` of logits (B, K), mean over the batch: a scalar >= 0.

    b is (p, 1 - p) of the class in ``labels`` (B,), q the distribution over the other classes alone, both softened by
    the ``temperature`` T.
    """
    wanted = soft_targets("dkd", student, teacher, temperature, shared)
    found = F.log_softmax(full_precision(student) / temperature, dim=1)
    rest = torch.arange(found.shape[1] - 1, device=found.device).expand(len(found), -1)
    rest = rest + (rest >= labels[:, None]).long()

    def parts(log_probability: Tensor) -> tuple[Tensor, Tensor]:
        other = log_probability.gather(1, rest)
        total = other.logsumexp(1, keepdim=True)
        return torch.cat([log_probability.gather(1, labels[:, None]), total], 1), other - total

    binary, other = (
        F.kl_div(mine, theirs, reduction="sum", log_target=True) for mine, theirs in zip(parts(found), parts(wanted))
    )
    return (target * binary + others * other) / max(len(found), 1) * temperature**2


@register_term(
    "dkd",
    level="logits",
    weight=1.0,
    source="mdistiller, ImageNet (alpha 1, beta 0.5, T 1)",
    summary="the probability of the target class, and by itself the distribution over the others",
    truth="labels",
)
class DKD(nn.Module):
    """The term ``dkd``."""

    reads = ("kd",)

    def __init__(self, pair: LayerPair, target: float = 1.0, others: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature("dkd", temperature)
        check_factors("dkd", target=target, others=others)
        if pair.student_channels == 1:
            raise ValueError("dkd: there is one class only, and no other to compare")
        self.target, self.others, self.temperature = target, others, temperature

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared, labels: Tensor) -> Tensor:
        return dkd_loss(student, teacher, labels, self.target, self.others, self.temperature, shared)
