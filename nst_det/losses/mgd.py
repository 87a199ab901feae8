"""MGD: a part of the student's map is enough to generate the teacher's (Yang et al. 2022, arXiv 2205.01529)."""

import torch
from torch import Tensor, nn

from nst_det.losses.ops import Shared, aligned, channel_adapter
from nst_det.losses.registry import LayerPair, register_term


def generation_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps (B, C, H, W), ``generated`` and the teacher's: sum over an image, mean over images."""
    return (generated - teacher).square().sum() / len(teacher)


@register_term(
    "mgd",
    level="maps",
    weight=5e-7,
    source="the MGD authors' code for two-stage detectors (alpha 5e-7, 45 % masked)",
    summary="the map itself, generated from a masked one",
)
class MGD(nn.Module):
    """The term ``mgd``: two 3x3 convolutions generate the teacher's map from a masked one of the student.

    In training mode alone a mask of positions is drawn, from torch's global generator of the maps' device.
    """

    reads = ("aligned",)

    def __init__(self, pair: LayerPair, masked: float = 0.45) -> None:
        super().__init__()
        if not 0 <= masked < 1:
            raise ValueError(f"mgd: masked must be in [0, 1), not {masked}")
        channels = pair.teacher_channels
        self.masked = masked
        self.adapter = channel_adapter(pair.student_channels, channels)
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, student: Tensor, teacher: Tensor, shared: Shared) -> Tensor:
        small, target = aligned(student, teacher, shared)
        small = self.adapter(small)
        if self.training:
            batch, _, height, width = small.shape
            small = small * (torch.rand(batch, 1, height, width, device=small.device) >= self.masked)
        return generation_loss(self.generator(small), target)
