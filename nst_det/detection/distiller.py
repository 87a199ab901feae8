"""A detector that learns from another one while it trains; works around any detector with a ``backbone``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from nst_det.detection.box_head import (
    BoxHeadTap,
    BoxOutputs,
    Widths,
    box_outputs,
    check_classes,
    reads_box_head,
    widths_of,
)
from nst_det.engine.distributed import is_main_process
from nst_det.engine.format import text_table
from nst_det.errors import UserError
from nst_det.losses import ModelOutputs, TermBalance, TransferLoss, build_transfer, pair_shapes, parse_method
from nst_det.losses import loss as shapes
from nst_det.losses import loss_balance as balance

log = logging.getLogger(__name__)
# side in pixels of the black image that the shapes are read from
SIDE = 256
PREFIX = "loss_transfer_"


def translate_pixels(pixels: Tensor, student: Any, teacher: Any, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalize (B, 3, H, W) pixels for the teacher that were normalized for the student; padding stays zero.

    ``sizes`` are (height, width) of each image without padding.
    """
    raw = pixels * student.pixel_std + student.pixel_mean
    if _format(student) != _format(teacher):
        raw = raw.flip(1)
    changed = (raw - teacher.pixel_mean) / teacher.pixel_std
    out = torch.zeros_like(changed)
    for image, (height, width) in enumerate(sizes):
        out[image, :, :height, :width] = changed[image, :, :height, :width]
    return out


def take_same_pixels(student: nn.Module, teacher: nn.Module) -> bool:
    """Return whether both normalize alike, or one of them doesn't say how; on a GPU the host waits for it twice."""
    names = ("pixel_mean", "pixel_std")
    if not all(hasattr(module, name) for module in (student, teacher) for name in names):
        return True
    return _format(student) == _format(teacher) and all(
        torch.equal(getattr(student, name), getattr(teacher, name)) for name in names
    )


def _format(detector: Any) -> str:
    return getattr(detector, "input_format", None) or "BGR"


def padded(pixels: Tensor, multiple: int) -> Tensor:
    """Pad (B, 3, H, W) with zeros, right and below, so that H and W are multiples; below 2 nothing is padded."""
    height, width = pixels.shape[-2:]
    if multiple < 2 or (height % multiple == 0 and width % multiple == 0):
        return pixels
    return F.pad(pixels, (0, -width % multiple, 0, -height % multiple))


def backbone_of(detector: nn.Module) -> nn.Module:
    """Return a detector's ``backbone``."""
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{type(detector).__name__} has no backbone module, so its feature maps can't be compared")
    return backbone


def below_fpn(backbone: nn.Module) -> nn.Module:
    """Return what is below a backbone's FPN; the backbone itself where it has none."""
    below: nn.Module = getattr(backbone, "bottom_up", backbone)
    return below


def level_channels(backbone: nn.Module) -> dict[str, int]:
    """Return level -> channels of a detector's backbone and of its ``bottom_up``, if it has one."""
    return {name: channels for name, (channels, _) in _levels(backbone).items()}


def level_strides(backbone: nn.Module) -> dict[str, int]:
    """Return level -> stride in pixels, as far as the backbone tells it, of the levels of :func:`level_channels`."""
    return {name: stride for name, (_, stride) in _levels(backbone).items() if stride is not None}


def _levels(backbone: nn.Module) -> dict[str, tuple[int, int | None]]:
    below = below_fpn(backbone)
    found = {} if below is backbone else _levels(below)
    shapes = getattr(backbone, "output_shape", None)
    if shapes is not None:
        return found | {name: (int(shape.channels), shape.stride) for name, shape in shapes().items()}
    strides: Mapping[str, int] = getattr(backbone, "strides", {})
    channels: Mapping[str, int] = getattr(backbone, "channels", {})
    return found | {name: (count, strides.get(name)) for name, count in channels.items()}


def feature_maps(backbone: nn.Module, pixels: Tensor, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Return level -> map (B, C, H, W), those below an FPN among them; an FPN that isn't wanted is not computed."""
    below = below_fpn(backbone)
    if below is not backbone and set(wanted) <= set(level_channels(below)):
        return dict(below(pixels))
    kept: dict[str, Tensor] = {}
    hook = below.register_forward_hook(lambda _module, _inputs, maps: kept.update(maps))
    try:
        return kept | dict(backbone(pixels))
    finally:
        hook.remove()


def log_shapes(model: DistilledDetector) -> None:
    """Log a table of all pairs that the method compares, for a black image of :data:`SIDE` pixels."""
    if not is_main_process():
        return
    ours, theirs = backbone_of(model.student), backbone_of(model.teacher)
    side = max(_side(ours), _side(theirs))
    student = _probe(ours, model.transfer.student_levels, side)
    teacher = _probe(theirs, model.transfer.teacher_levels, side)
    for outputs, widths in zip((student, teacher), model.box_widths):
        outputs.embedding, outputs.logits = (torch.empty(1, width) for width in widths)
    strides = level_strides(ours), level_strides(theirs)
    lines = [line.cells for line in pair_shapes(model.transfer, student, teacher, *strides)]
    log.info("compared at %d x %d pixels:\n%s", side, side, text_table(shapes.HEADINGS, lines))


def _probe(backbone: nn.Module, levels: Sequence[str], side: int) -> ModelOutputs:
    if not levels:
        return ModelOutputs()
    training = [module for module in backbone.modules() if module.training]
    parameter = next(backbone.parameters())
    black = torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    try:
        with torch.no_grad():
            maps: dict[str, Tensor] = feature_maps(backbone, black, levels)
    finally:
        for module in training:
            module.training = True
    return ModelOutputs(maps=maps)


def _side(backbone: Any) -> int:
    """Return the side in pixels that a backbone asks for (Detectron2's ViT does), or :data:`SIDE` made divisible."""
    multiple = max(int(getattr(backbone, "size_divisibility", 0) or 0), 1)
    wanted = (getattr(backbone, "padding_constraints", None) or {}).get("square_size", 0)
    return int(wanted) or -(-SIDE // multiple) * multiple


def log_balance(lines: Sequence[TermBalance]) -> None:
    """Log a table of the terms against the detector's own losses, and a warning for each one-sided term."""
    if not is_main_process():
        return
    rows = [line.cells for line in lines]
    log.info("terms against the detector's own losses:\n%s", text_table(balance.HEADINGS, rows))
    for line in lines:
        if line.one_sided:
            log.warning("%s", line.warning)


class DistilledDetector(nn.Module):
    """A student detector with transfer losses from a teacher's feature maps and box head.

    It listens to the student's ``backbone``: the pixels that enter and the maps (level -> map) that leave.  The
    teacher's backbone sees the same pixels, normalized its own way, in the same autocast state.  For terms on logits or
    embeddings it listens to the student's box head too: the boxes that it is trained on, and its outputs for them; the
    teacher's box head is run on the same boxes.  No other part of the teacher is used.  The weighted terms
    join the student's loss dict, so that any trainer that sums such a dict can train it.

    In the first step, or the first few where AUTO_WEIGHT chooses weights, the terms' gradients in the backbone are
    measured against that of the student's own losses and logged; nothing else in those steps changes.

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
        transfer: from :func:`~nst_det.losses.build_transfer` with levels of both backbones.
        warmup_iters: the weights rise linearly from 0 over that many training steps.
        box_outputs: runs the teacher's RoI heads, where they aren't the torchvision engine's.

    Attributes:
        iteration: training steps done; set it when a run resumes.
        box_widths: of the student's and the teacher's box head; empty if no term reads these.

    Example:
        >>> from nst_det.losses import build_transfer
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

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        transfer: TransferLoss,
        warmup_iters: int = 0,
        box_outputs: BoxOutputs = box_outputs,
    ) -> None:
        super().__init__()
        self.student, self.transfer = student, transfer
        # in a tuple, a module is not registered as a part
        self._teacher = (teacher.eval().requires_grad_(False),)
        self.warmup_iters, self.iteration = warmup_iters, 0
        self._student_maps: dict[str, Tensor] = {}
        self._teacher_maps: dict[str, Tensor] = {}
        self._sizes: list[tuple[int, int]] = []
        self._box_outputs, self._tap = box_outputs, None
        self.box_widths: tuple[Widths, ...] = ()
        if reads_box_head(transfer.method):
            self.box_widths = widths_of(student, transfer.method), widths_of(teacher, transfer.method)
            self._tap = BoxHeadTap(student)
        backbone = backbone_of(student)
        backbone.register_forward_pre_hook(self._run_teacher)
        backbone.register_forward_hook(self._keep_maps)
        below = below_fpn(backbone)
        if below is not backbone and set(transfer.student_levels) & set(level_channels(below)):
            below.register_forward_hook(self._keep_maps)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """Return the student's losses and a ``loss_transfer_<term>`` a term in training, else the student's output.

        Raises:
            RuntimeError: the student's forward doesn't call ``student.backbone``.
            UserError: AUTO_WEIGHT can't choose a weight, since a term has no gradient in the backbone.
        """
        if not self.training:
            return self.student(batched_inputs, *args, **kwargs)
        self._sizes = [tuple(item["image"].shape[-2:]) for item in batched_inputs]
        try:
            losses = dict(self.student(batched_inputs, *args, **kwargs))
            if not self._teacher_maps:
                raise RuntimeError("the student's forward didn't call student.backbone, so there is nothing to compare")
            terms = self._balanced(losses, self.transfer(*self._outputs()))
        finally:
            self._student_maps, self._teacher_maps = {}, {}
            if self._tap is not None:
                self._tap.forget()
        factor = min((self.iteration + 1) / self.warmup_iters, 1.0) if self.warmup_iters else 1.0
        self.iteration += 1
        return losses | {f"{PREFIX}{name}": value * factor for name, value in terms.items()}

    def _outputs(self) -> tuple[ModelOutputs, ModelOutputs]:
        student, teacher = ModelOutputs(maps=self._student_maps), ModelOutputs(maps=self._teacher_maps)
        if self._tap is not None:
            boxes = self._tap.take(student)
            with torch.no_grad():
                # as the heads of a detector get them when its backbone computes in lower precision
                maps = {name: map_.float() for name, map_ in teacher.maps.items()}
                teacher.embedding, teacher.logits = self._box_outputs(self.teacher.roi_heads, maps, boxes)
        return student, teacher

    def _balanced(self, losses: Mapping[str, Tensor], terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms, measured against the student's own losses in the first steps, by the weights chosen there."""
        balance = self.transfer.balance
        if not (balance.wants(self.iteration) and torch.is_grad_enabled()):
            return terms
        parameters = [item for item in backbone_of(self.student).parameters() if item.requires_grad]
        if not parameters:
            if balance.shares:
                raise UserError(
                    "TRANSFER.AUTO_WEIGHT: the student's backbone is frozen, so no term has a gradient there"
                )
            return terms
        try:
            terms = balance(torch.stack(list(losses.values())).sum(), terms, parameters)
        except ValueError as error:
            raise UserError(f"TRANSFER.{error}") from error
        if balance.lines:
            log_balance(balance.lines)
        return terms

    @property
    def _is_training(self) -> bool:
        # the student alone may be put into evaluation mode
        return self.training and self.student.training

    @cached_property
    def _same_pixels(self) -> bool:
        return take_same_pixels(self.student, self.teacher)

    def _run_teacher(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._is_training:
            with torch.no_grad():
                self._teacher_maps = self._teacher_forward(inputs[0].detach())

    def _keep_maps(self, _: nn.Module, __: Any, maps: Mapping[str, Tensor]) -> None:
        if self._is_training:
            self._student_maps.update(maps)

    def _teacher_forward(self, pixels: Tensor) -> dict[str, Tensor]:
        backbone = backbone_of(self.teacher)
        if not self._same_pixels:
            pixels = translate_pixels(pixels, self.student, self.teacher, self._sizes)
        pixels = padded(pixels, int(getattr(backbone, "size_divisibility", 0) or 0))
        if self._tap is not None:
            # a box head stands on the whole of it
            return feature_maps(backbone, pixels, level_channels(backbone))
        return feature_maps(backbone, pixels, self.transfer.teacher_levels)

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


def distill(
    student: nn.Module, teacher: nn.Module, method: str, node: CfgNode, box_outputs: BoxOutputs = box_outputs
) -> DistilledDetector:
    """Wrap a detector as the config's METHOD and TRANSFER say.

    Args:
        student: a detector with a ``backbone``.
        teacher: another, trained.
        method: such as ``nst-poly`` or ``kd+nst-poly:10``.
        node: TRANSFER: LEVELS, WEIGHTS, TERM_LEVELS, OPTIONS, AUTO_WEIGHT, WARMUP_ITERS.
        box_outputs: runs the teacher's RoI heads, where they aren't the torchvision engine's.

    Raises:
        UserError: the method can't be built from what these two give, the line names what there is.
    """
    sizes: dict[str, Any] = {}
    try:
        parsed = parse_method(method)
        if reads_box_head(parsed):
            mine, theirs = widths_of(student, parsed), widths_of(teacher, parsed)
            sizes = {"student_embedding": mine.embedding, "teacher_embedding": theirs.embedding}
            # a term that compares them class by class has no parameters of this width; see check_classes
            sizes["num_classes"] = theirs.logits
        transfer = build_transfer(
            parsed,
            levels=node.LEVELS,
            student_channels=level_channels(backbone_of(student)),
            teacher_channels=level_channels(backbone_of(teacher)),
            weights=node.WEIGHTS,
            term_levels=node.TERM_LEVELS,
            options=node.OPTIONS,
            auto_weight=node.AUTO_WEIGHT,
            **sizes,
        )
    except ValueError as error:
        raise UserError(f"TRANSFER: {error}") from error
    model = DistilledDetector(student, teacher, transfer, node.WARMUP_ITERS, box_outputs)
    if model.box_widths:
        check_classes(transfer, *(widths.logits for widths in model.box_widths))
    return model


def wants_teacher(config: CfgNode) -> bool:
    """Return whether METHOD asks for a teacher detector; ``ce`` doesn't."""
    try:
        terms = parse_method(config.METHOD).names
    except ValueError as error:
        raise UserError(f"METHOD: {error}") from error
    if terms and not config.TEACHER.CONFIG_FILE:
        raise UserError(
            f"METHOD {config.METHOD} needs a teacher; set TEACHER.CONFIG_FILE and TEACHER.WEIGHTS, or METHOD ce"
        )
    return bool(terms)
