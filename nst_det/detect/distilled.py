"""A detector that learns from another one while it trains; works around any detector with a ``backbone``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.errors import UserError
from nst_det.transfer import Outputs, TransferLoss, build_transfer, parse_method

PREFIX = "loss_transfer_"


class DistilledDetector(nn.Module):
    """A student detector with transfer losses from a teacher's feature maps.

    It listens to the student's ``backbone``: the pixels that enter and the maps (level -> map) that leave.  The
    teacher's backbone, and no other part of it, sees the same pixels, normalized its own way, in the same autocast
    state.  The weighted terms join the student's loss dict, so that any trainer that sums such a dict can train it.

    It assumes that ``student.backbone`` is called once in a training step, with (B, 3, H, W) pixels, and gives a dict
    of maps; levels that only ``student.backbone.bottom_up`` gives (``res2`` .. ``res5`` below an FPN) are taken there.
    ``pixel_mean``, ``pixel_std`` and ``input_format`` of both detectors are compared where both have them.

    Only the student is in the state dict, by the student's own names, so that a checkpoint of this module is one of
    the student.  The teacher is not a submodule: it is never trained, never saved and never in ``parameters()``, but
    moves along by ``to()``.  Adapters of the terms are in ``parameters()`` and have a state dict of their own,
    ``transfer.state_dict()``.

    Args:
        student: the detector to train, engine's or anyone's; takes a list of dicts with ``image``.
        teacher: a trained detector; it is frozen here.
        transfer: from :func:`~nst_det.transfer.build_transfer` with levels of both backbones.
        warmup_iters: the weights rise linearly from 0 over that many training steps.

    Attributes:
        iteration: training steps done; set it when a run goes on.

    Example:
        >>> from nst_det.transfer import build_transfer
        >>> class Small(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.backbone = nn.Sequential(nn.Conv2d(3, channels, 3), Maps())
        ...     def forward(self, batch):
        ...         maps = self.backbone(torch.stack([item["image"] for item in batch]))
        ...         return {"loss_cls": maps["p3"].mean()}
        >>> class Maps(nn.Module):
        ...     def forward(self, x):
        ...         return {"p3": x}
        >>> student, teacher = Small(4), Small(8)
        >>> transfer = build_transfer(
        ...     "nst-poly", levels=["p3"], student_channels={"p3": 4}, teacher_channels={"p3": 8}
        ... )
        >>> model = DistilledDetector(student, teacher, transfer)
        >>> sorted(model([{"image": torch.rand(3, 16, 16)}]))
        ['loss_cls', 'loss_transfer_nst-poly']
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, transfer: TransferLoss, warmup_iters: int = 0) -> None:
        super().__init__()
        self.student, self.transfer = student, transfer
        # in a tuple, a module is not registered as a part
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.warmup_iters, self.iteration = warmup_iters, 0
        self._student_maps: dict[str, Tensor] = {}
        self._teacher_maps: dict[str, Tensor] = {}
        self._sizes: list[tuple[int, int]] = []
        backbone = _backbone(student)
        backbone.register_forward_pre_hook(self._run_teacher)
        backbone.register_forward_hook(self._keep_maps)
        below = getattr(backbone, "bottom_up", backbone)
        if below is not backbone and set(transfer.student_levels) & set(level_channels(below)):
            below.register_forward_hook(self._keep_maps)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """In training the student's losses and a ``loss_transfer_<term>`` a term; otherwise what the student says.

        Raises:
            RuntimeError: the student's forward doesn't call ``student.backbone``.
        """
        if not self.training:
            return self.student(batched_inputs, *args, **kwargs)
        self._sizes = [tuple(item["image"].shape[-2:]) for item in batched_inputs]
        try:
            losses = dict(self.student(batched_inputs, *args, **kwargs))
            if not self._teacher_maps:
                raise RuntimeError("the student's forward didn't call student.backbone, so there is nothing to compare")
            terms = self.transfer(Outputs(maps=self._student_maps), Outputs(maps=self._teacher_maps))
        finally:
            self._student_maps, self._teacher_maps = {}, {}
        factor = min((self.iteration + 1) / self.warmup_iters, 1.0) if self.warmup_iters else 1.0
        self.iteration += 1
        return losses | {f"{PREFIX}{name}": value * factor for name, value in terms.items()}

    def _run_teacher(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.training:
            with torch.no_grad():
                self._teacher_maps = self._teacher_forward(inputs[0].detach())

    def _keep_maps(self, _: nn.Module, __: Any, maps: Mapping[str, Tensor]) -> None:
        if self.training:
            self._student_maps.update(maps)

    def _teacher_forward(self, pixels: Tensor) -> dict[str, Tensor]:
        backbone = _backbone(self.teacher)
        multiple = int(getattr(backbone, "size_divisibility", 0) or 0)
        below = getattr(backbone, "bottom_up", backbone)
        pixels = _pad(translate_pixels(pixels, self.student, self.teacher, self._sizes), multiple)
        wanted = self.transfer.teacher_levels
        # an FPN that no term looks at is not computed
        if below is not backbone and set(wanted) <= set(level_channels(below)):
            return dict(below(pixels))
        kept: dict[str, Tensor] = {}
        hook = below.register_forward_hook(lambda _module, _inputs, maps: kept.update(maps))
        try:
            return kept | dict(backbone(pixels))
        finally:
            hook.remove()

    def train(self, mode: bool = True) -> DistilledDetector:
        """As ``nn.Module.train``; the teacher stays in evaluation mode."""
        super().train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The student's, by the student's names."""
        own: dict[str, Any] = self.student.state_dict(*args, **kwargs)
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Into the student."""
        return self.student.load_state_dict(state_dict, strict=strict, assign=assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistilledDetector:
        super()._apply(fn, recurse)
        self.teacher._apply(fn, recurse)
        return self


def distill(student: nn.Module, teacher: nn.Module, node: CfgNode) -> DistilledDetector:
    """Wrap a detector as the config's TRANSFER node says.

    Args:
        student: a detector with a ``backbone``.
        teacher: another, trained.
        node: TRANSFER: METHOD, LEVELS, WEIGHTS, TERM_LEVELS, OPTIONS, WARMUP_ITERS.

    Raises:
        UserError: METHOD can't be built from maps of these two, the line names what there is.
    """
    try:
        transfer = build_transfer(
            node.METHOD,
            levels=node.LEVELS,
            student_channels=level_channels(_backbone(student)),
            teacher_channels=level_channels(_backbone(teacher)),
            weights=node.WEIGHTS,
            term_levels=node.TERM_LEVELS,
            options=node.OPTIONS,
        )
    except ValueError as error:
        raise UserError(f"TRANSFER: {error}") from error
    others = (transfer.reads("student") | transfer.reads("teacher")) - {"maps"}
    if others:
        raise UserError(
            f"TRANSFER.METHOD {node.METHOD}: it reads {' and '.join(sorted(others))}, which a detector's backbone "
            "doesn't give; use terms on feature maps, such as nst-poly"
        )
    return DistilledDetector(student, teacher, transfer, node.WARMUP_ITERS)


def wants_teacher(node: CfgNode) -> bool:
    """Whether TRANSFER asks for a teacher detector; ``ce`` doesn't.

    Raises:
        UserError: METHOD is no method's word, or there is no teacher to learn from.
    """
    try:
        terms = parse_method(node.METHOD).names
    except ValueError as error:
        raise UserError(f"TRANSFER.METHOD: {error}") from error
    if terms and not node.TEACHER.CONFIG_FILE:
        raise UserError(
            f"TRANSFER.METHOD {node.METHOD} needs a teacher; set TRANSFER.TEACHER.CONFIG_FILE and WEIGHTS, or METHOD ce"
        )
    return bool(terms)


def level_channels(backbone: nn.Module) -> dict[str, int]:
    """Level -> channels of a detector's backbone: its own levels, and those of its ``bottom_up`` if it has one."""
    channels: dict[str, int] = {}
    below = getattr(backbone, "bottom_up", backbone)
    if below is not backbone:
        channels.update(level_channels(below))
    shapes = getattr(backbone, "output_shape", None)
    if shapes is not None:
        channels.update({name: int(shape.channels) for name, shape in shapes().items()})
    else:
        channels.update(getattr(backbone, "channels", {}))
    return channels


def translate_pixels(
    pixels: Tensor, student: nn.Module, teacher: nn.Module, sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Pixels normalized for the student as the teacher wants them; padding stays zero.

    Args:
        pixels: (B, 3, H, W).
        student: has ``pixel_mean``, ``pixel_std`` and ``input_format``; without them pixels stay as they are.
        teacher: as ``student``.
        sizes: (height, width) of each image without padding.
    """
    if not all(hasattr(module, "pixel_mean") and hasattr(module, "pixel_std") for module in (student, teacher)):
        return pixels
    (mean, std), (new_mean, new_std) = (_normalization(module) for module in (student, teacher))
    flip = {getattr(module, "input_format", None) or "BGR" for module in (student, teacher)} == {"RGB", "BGR"}
    if not flip and torch.equal(mean, new_mean) and torch.equal(std, new_std):
        return pixels
    raw = pixels * std + mean
    changed = ((raw.flip(1) if flip else raw) - new_mean) / new_std
    out = torch.zeros_like(changed)
    for image, (height, width) in enumerate(sizes):
        out[image, :, :height, :width] = changed[image, :, :height, :width]
    return out


def _normalization(detector: Any) -> tuple[Tensor, Tensor]:
    return detector.pixel_mean, detector.pixel_std


def _pad(pixels: Tensor, multiple: int) -> Tensor:
    height, width = pixels.shape[-2:]
    if multiple < 2 or (height % multiple == 0 and width % multiple == 0):
        return pixels
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple))


def _backbone(detector: nn.Module) -> nn.Module:
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{type(detector).__name__} has no backbone module, so its feature maps can't be compared")
    return backbone
