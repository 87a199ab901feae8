"""The feature maps of a detector's backbone: which levels there are, and those that are wanted for given pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from nst_det.errors import UserError


def backbone_of(detector: nn.Module) -> nn.Module:
    """A detector's ``backbone``.

    Raises:
        UserError: it has none.
    """
    backbone = getattr(detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{type(detector).__name__} has no backbone module, so its feature maps can't be compared")
    return backbone


def below_fpn(backbone: nn.Module) -> nn.Module:
    """What stands below a backbone's FPN; the backbone itself where it has none."""
    below: nn.Module = getattr(backbone, "bottom_up", backbone)
    return below


def level_channels(backbone: nn.Module) -> dict[str, int]:
    """Level -> channels of a detector's backbone: its own levels, and those of its ``bottom_up`` if it has one."""
    return {name: channels for name, (channels, _) in _levels(backbone).items()}


def level_strides(backbone: nn.Module) -> dict[str, int]:
    """Level -> stride in pixels, as far as the backbone tells it, of the levels of :func:`level_channels`."""
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
    """Level -> map (B, C, H, W), those below an FPN among them; an FPN that isn't wanted is not computed.

    Args:
        backbone: gives a dict of maps, and so does its ``bottom_up`` if it has one.
        pixels: (B, 3, H, W), normalized and padded.
        wanted: levels.
    """
    below = below_fpn(backbone)
    if below is not backbone and set(wanted) <= set(level_channels(below)):
        return dict(below(pixels))
    kept: dict[str, Tensor] = {}
    hook = below.register_forward_hook(lambda _module, _inputs, maps: kept.update(maps))
    try:
        return kept | dict(backbone(pixels))
    finally:
        hook.remove()
