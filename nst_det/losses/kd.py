"""KD: the teacher's softened class probabilities (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)."""

from torch import Tensor, nn
from torch.nn import functional as F

from nst_det.losses.ops import Shared, check_temperature, compute_now, full_precision
from nst_det.losses.registry import LayerPair, register_term


def soft_targets(term: str, student: Tensor, teacher: Tensor, temperature: float, shared: Shared) -> Tensor:
    """Return the logarithms of a teacher's softened probabilities (B, K), shared by all terms that ask for them."""
    if student.shape != teacher.shape:
        raise ValueError(f"{term} compares logits of one shape; got {tuple(student.shape)} and {tuple(teacher.shape)}")
    target: Tensor = shared(
        ("kd", temperature), lambda: F.log_softmax(full_precision(teacher.detach()) / temperature, dim=1)
    )
    return target


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, shared: Shared = compute_now) -> Tensor:
    """``T^2 * KL(softmax(z_T / T) || softmax(z_S / T))`` of logits (B, K), mean over the batch: a scalar >= 0.

    T is the ``temperature``.  No gradient goes to the teacher; ``shared`` keeps its soft targets for other students.
    """
    target = soft_targets("kd", student, teacher, temperature, shared)
    log_probability = F.log_softmax(full_precision(student) / temperature, dim=1)
    # a batch of RoIs can be empty, and has the value 0 then
    return F.kl_div(log_probability, target, reduction="sum", log_target=True) / max(len(student), 1) * temperature**2


@register_term(
    "kd",
    level="logits",
    weight=1.0,
    source="ours: 1 on T^2 KL at T=4 has the gradient of the NST paper's 16 on the soft cross-entropy",
    summary="the teacher's softened class probabilities",
)
class KD(nn.Module):
    """The term ``kd``."""

    reads = ("kd",)

    def __init__(self, pair: LayerPair, temperature: float = 4.0) -> None:
        super().__init__()
        check_temperature("kd", temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        return kd_loss(student, teacher, self.temperature, shared)
