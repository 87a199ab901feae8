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
    box_outputs,
    check_classes,
    objects_of,
    reads_box_head,
    roi_labels,
    widths_of,
)
from nst_det.engine.distributed import is_main_process
from nst_det.engine.format import text_table
from nst_det.errors import UserError
from nst_det.losses import (
    ModelOutputs,
    TransferLoss,
    build_transfer,
    get_term,
    loss,
    loss_balance,
    pair_shapes,
    parse_method,
)

log = logging.getLogger(__name__)
PREFIX = "loss_transfer_"


def translate_pixels(pixels: Tensor, student: Any, teacher: Any, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalize (B, 3, H, W) pixels for the teacher that were normalized for the student; padding stays zero."""
    raw = pixels * student.pixel_std + student.pixel_mean
    if _format(student) != _format(teacher):
        raw = raw.flip(1)
    changed = (raw - teacher.pixel_mean) / teacher.pixel_std
    ends = torch.tensor(sizes).to(pixels.device, non_blocking=True)[:, :, None]
    rows, columns = (torch.arange(size, device=pixels.device) for size in pixels.shape[-2:])
    padding = (rows >= ends[:, 0])[:, None, :, None] | (columns >= ends[:, 1])[:, None, None]
    return changed.masked_fill_(padding, 0)


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


def backbone_of(detector: nn.Module) -> nn.Module:
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{type(detector).__name__} has no backbone module, so its feature maps can't be compared")
    return backbone


def below_fpn(backbone: nn.Module) -> nn.Module:
    """Return what is below a backbone's FPN; the backbone itself where it has none."""
    below: nn.Module = getattr(backbone, "bottom_up", backbone)
    return below


def level_shapes(backbone: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Return the channels and, if known, the stride of each level of a backbone and of its ``bottom_up``."""
    below = below_fpn(backbone)
    found = {} if below is backbone else level_shapes(below)
    shapes = getattr(backbone, "output_shape", None)
    if shapes is not None:
        return found | {name: (int(shape.channels), shape.stride) for name, shape in shapes().items()}
    strides: Mapping[str, int] = getattr(backbone, "strides", {})
    channels: Mapping[str, int] = getattr(backbone, "channels", {})
    return found | {name: (count, strides.get(name)) for name, count in channels.items()}


def level_channels(backbone: nn.Module) -> dict[str, int]:
    return {name: channels for name, (channels, _) in level_shapes(backbone).items()}


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


class DistilledDetector(nn.Module):
    """A student detector with transfer losses from a teacher's feature maps and box head.

    It assumes that ``student.backbone`` is called once in a training step, with (B, 3, H, W) pixels, and gives a dict
    of maps (level -> (B, C, H, W)); levels that only ``student.backbone.bottom_up`` gives (``res2`` .. ``res5`` below
    an FPN) are taken there.  The teacher's backbone gets the same pixels, normalized its own way (``pixel_mean``,
    ``pixel_std`` and ``input_format``, where both detectors have them), in the same autocast state.  For terms on
    logits or embeddings the teacher's box head gets the boxes that the student's is trained on; terms that ask for
    labels get those of these boxes, terms that ask for boxes the objects'.  No other part of the teacher is used.  The
    weighted terms join the student's loss dict, so that any trainer that sums it can train it.

    In the first step the shapes of all that is compared are logged.  In the first step, or the first few where
    AUTO_WEIGHT chooses weights, the terms' gradients in the backbone are measured against that of the student's own
    losses and logged; nothing else in those steps changes.

    Its state dict is the student's, by the student's own names.  The teacher is not a submodule: it is never trained,
    never saved and never in ``parameters()``, but moves along by ``to()``.  Adapters of the terms are in
    ``parameters()`` and have a state dict of their own, ``transfer.state_dict()``.

    Args:
        student: the detector to train, engine's or anyone's; takes a list of dicts with ``image``.
        teacher: a trained detector; it is frozen here.
        transfer: from :func:`~nst_det.losses.build_transfer` with levels of both backbones.
        warmup_iters: the weights rise linearly from 0 over that many training steps.
        box_outputs: runs the teacher's RoI heads, where they aren't the torchvision engine's.

    Attributes:
        iteration: training steps done; set it when a run resumes.

    Example::

        model = DistilledDetector(student, teacher, build_transfer("nst-poly", levels=["p3"], **channels_of_both))
        losses = model(batch)  # the student's, and loss_transfer_nst-poly
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
        self._logged = not is_main_process()
        self._truths = {get_term(name).truth for name in transfer.pairs}
        if reads_box_head(transfer.method):
            check_classes(transfer, widths_of(student, transfer.method), widths_of(teacher, transfer.method))
            self._tap = BoxHeadTap(student)
        backbone = backbone_of(student)
        backbone.register_forward_pre_hook(self._run_teacher)
        backbone.register_forward_hook(self._keep_maps)
        below = below_fpn(backbone)
        if below is not backbone and set(transfer.student_levels) & set(level_channels(below)):
            below.register_forward_hook(self._keep_maps)

    @property
    def teacher(self) -> nn.Module:
        """Return the frozen teacher."""
        return self._teacher[0]

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """Return the student's losses and a ``loss_transfer_<term>`` a term in training, else the student's output.

        Raises:
            RuntimeError: the student's forward doesn't call ``student.backbone``, or a box head that a term reads.
            UserError: AUTO_WEIGHT can't choose a weight, since a term has no gradient in the backbone.
        """
        if not self.training:
            return self.student(batched_inputs, *args, **kwargs)
        self._sizes = [tuple(item["image"].shape[-2:]) for item in batched_inputs]
        try:
            losses = dict(self.student(batched_inputs, *args, **kwargs))
            if not self._teacher_maps:
                raise RuntimeError("the student's forward didn't call student.backbone, so there is nothing to compare")
            student, teacher = ModelOutputs(maps=self._student_maps), ModelOutputs(maps=self._teacher_maps)
            if self._tap is not None:
                boxes = self._tap.take(student)
                if "labels" in self._truths:
                    student.labels = roi_labels(self.student.roi_heads, boxes, map(objects_of, batched_inputs))
                with torch.no_grad():
                    # as the heads of a detector get them when its backbone computes in lower precision
                    maps = {name: map_.float() for name, map_ in teacher.maps.items()}
                    teacher.embedding, teacher.logits = self._box_outputs(self.teacher.roi_heads, maps, boxes)
            if "boxes" in self._truths:
                student.boxes = self._box_shares(batched_inputs)
            if not self._logged:
                self._log_shapes(student, teacher)
            terms = self._balanced(losses, self.transfer(student, teacher))
        finally:
            self._student_maps, self._teacher_maps = {}, {}
            if self._tap is not None:
                self._tap.forget()
        factor = min((self.iteration + 1) / self.warmup_iters, 1.0) if self.warmup_iters else 1.0
        self.iteration += 1
        terms = terms if factor == 1 else {name: value * factor for name, value in terms.items()}
        return losses | {f"{PREFIX}{name}": value for name, value in terms.items()}

    def _box_shares(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        height, width = self._pixels
        device = next(iter(self._student_maps.values())).device
        boxes = [objects_of(item)[0].float() for item in batched_inputs]
        shares = [of_image / of_image.new_tensor([width, height, width, height]) for of_image in boxes]
        return [of_image.to(device, non_blocking=True) for of_image in shares]

    def _log_shapes(self, student: ModelOutputs, teacher: ModelOutputs) -> None:
        known = [level_shapes(backbone_of(detector)).items() for detector in (self.student, self.teacher)]
        strides = ({name: stride for name, (_, stride) in shapes if stride is not None} for shapes in known)
        rows = pair_shapes(self.transfer, student, teacher, *strides)
        log.info("compared at %d x %d pixels:\n%s", *self._pixels, text_table(loss.HEADINGS, rows))
        self._logged = True

    def _balanced(self, losses: Mapping[str, Tensor], terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure the terms against the student's own losses in the first steps; return them by the weights chosen."""
        balance = self.transfer.balance
        if not (balance.wants(self.iteration) and torch.is_grad_enabled()):
            return terms
        parameters = [item for item in backbone_of(self.student).parameters() if item.requires_grad]
        if not parameters:
            if balance.shares:
                raise UserError("TRANSFER.AUTO_WEIGHT: the student's backbone is frozen, no term has a gradient there")
            return terms
        try:
            terms = balance(torch.stack(list(losses.values())).sum(), terms, parameters)
        except ValueError as error:
            raise UserError(f"TRANSFER.{error}") from error
        if balance.lines and is_main_process():
            rows = [line.cells for line in balance.lines]
            log.info("terms against the detector's own losses:\n%s", text_table(loss_balance.HEADINGS, rows))
            for line in balance.lines:
                if line.one_sided:
                    log.warning("%s", line.warning)
        return terms

    @property
    def _is_training(self) -> bool:
        # the student alone may be put into evaluation mode
        return self.training and self.student.training

    @cached_property
    def _same_pixels(self) -> bool:
        return take_same_pixels(self.student, self.teacher)

    @torch.no_grad()
    def _run_teacher(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not self._is_training:
            return
        pixels, backbone = inputs[0].detach(), backbone_of(self.teacher)
        self._pixels = tuple(pixels.shape[-2:])
        if not self._same_pixels:
            pixels = translate_pixels(pixels, self.student, self.teacher, self._sizes)
        height, width = pixels.shape[-2:]
        multiple = int(getattr(backbone, "size_divisibility", 0) or 0)
        if multiple > 1 and (height % multiple or width % multiple):
            pixels = F.pad(pixels, (0, -width % multiple, 0, -height % multiple))
        # a box head reads all levels
        levels = self.transfer.teacher_levels if self._tap is None else level_channels(backbone)
        self._teacher_maps = feature_maps(backbone, pixels, levels)

    def _keep_maps(self, _: nn.Module, __: Any, maps: Mapping[str, Tensor]) -> None:
        if self._is_training:
            self._student_maps.update(maps)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the student's, by the student's names."""
        own: dict[str, Any] = self.student.state_dict(*args, **kwargs)
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
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
        UserError: the method can't be built from what these two give; the line names what there is.
    """
    sizes: dict[str, Any] = {}
    try:
        parsed = parse_method(method)
        for term in map(get_term, parsed.names):
            if term.truth == "labels" and term.level == "maps":
                raise ValueError(f"{term.name} reads the labels of images, which stage one alone gives it")
        if reads_box_head(parsed):
            mine, theirs = widths_of(student, parsed), widths_of(teacher, parsed)
            sizes = {"student_embedding": mine.embedding, "teacher_embedding": theirs.embedding}
            # a term that compares them class by class has no parameters of this width, see check_classes
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
    return DistilledDetector(student, teacher, transfer, node.WARMUP_ITERS, box_outputs)


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
