"""The card of a backbone file: all that must be known to use the weights, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from nst_det.errors import UserError

if TYPE_CHECKING:
    from torch import nn

CHANNEL_ORDERS = ("RGB", "BGR")
INPUT_TOLERANCE = 1e-4


@dataclass
class Card:
    """The content of ``NAME.json``.

    Attributes:
        arch: timm name; with ``arch_kwargs`` and ``num_classes`` (0: without head) it builds the classifier.
        classes: names of the classes in the order of the logits; empty if unknown.
        levels: level -> {"stride", "channels"}.
        input: {"channel_order", "mean", "std", "size"}; mean and std on the 0..1 scale, in that channel order.
        start: the weights that training began with; empty for random ones.
        method: the transfer method, ``ce`` for labels only, or where the weights come from.
        weights: loss weights by term.
        teacher: name, arch, top1 and weights' sha256 of the teacher, or empty.
        data: name, fingerprint, images and classes of the training data, and whether it had labels.
        top1: accuracy on the validation split, 0..1; None if not measured.
        measured: without labels, 0..1 by name: knn and linear (accuracy on a labelled folder), agreement and cka (with
            the teacher).
        sha256: of the safetensors file; filled in when it is written.
    """

    arch: str
    num_classes: int
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    levels: dict[str, dict[str, int]] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    method: str = ""
    weights: dict[str, float] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    top1: float | None = None
    top5: float | None = None
    measured: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    params: int | None = None
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


_TYPES: dict[str, type | tuple[type, ...]] = {
    **{"str": str, "int": int, "list": list, "dict": dict},
    **{"float | None": (int, float, type(None)), "int | None": (int, type(None))},
}


def input_contract(mean: Sequence[float], std: Sequence[float], order: str, size: int) -> dict[str, Any]:
    """The ``input`` part of a card: mean and std per channel (0..1, in ``order``, RGB or BGR), image size in pixels."""
    return {"channel_order": order, "mean": list(mean), "std": list(std), "size": size}


def published_card(model: nn.Module, arch: str) -> Card:
    """The contract of timm's published weights for a model of ``create_model(arch, num_classes, True)``."""
    published: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    # timm has no channel order: its own networks see RGB
    order = getattr(model, "channel_order", "RGB")
    return Card(arch, 1, input=input_contract(published["mean"], published["std"], order, published["input_size"][-1]))


def card_from_json(value: Any, source: str) -> Card:
    """Return a card from what was read from a file, checked field by field; an error names file and field."""

    # timm takes seconds to import
    from nst_det.models.build import check_arch

    def refuse(name: str, why: Any) -> UserError:
        return UserError(f"{source}: field '{name}' {why}")

    if not isinstance(value, dict):
        raise UserError(f"{source}: not a backbone card (a mapping of fields is expected); write the backbone again")
    for name in ("arch", "num_classes", "input", "sha256"):
        if name not in value:
            raise refuse(name, "is missing; write the backbone again")
    known = {item.name: str(item.type).split("[")[0] for item in fields(Card) if item.name in value}
    for name, kind in known.items():
        if not isinstance(value[name], _TYPES[kind]) or isinstance(value[name], bool):
            raise refuse(name, f"has the wrong type ({type(value[name]).__name__})")
    card = Card(**{name: value[name] for name in known})
    if card.input.get("channel_order") not in CHANNEL_ORDERS:
        raise refuse("input.channel_order", "must be RGB or BGR")
    for name in ("mean", "std"):
        numbers = card.input.get(name)
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(_is_share, numbers)):
            raise refuse(f"input.{name}", "must be three numbers on the 0..1 scale")
    try:
        check_arch(card.arch, card.arch_kwargs)
    except ValueError as error:
        raise UserError(f"{source}: field 'arch': {error}") from error
    if not 0 <= card.num_classes <= 1_000_000:
        raise refuse("num_classes", f"is {card.num_classes}, outside 0 to 1000000")
    return card


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def check_input_contract(card: Card, mean: Sequence[float], std: Sequence[float], order: str = "RGB") -> None:
    """Refuse weights whose training saw pixels of another scale or channel order.

    Args:
        card: of the weights.
        mean: per channel, what will be subtracted, 0..1, in ``order`` (RGB or BGR).
        std: per channel, what will be divided by, likewise.
        order: of the channels now.

    Raises:
        UserError: one line with both sides.
    """
    trained_order = card.input["channel_order"]

    def shown(values: Sequence[float]) -> str:
        return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"

    for name, given in (("mean", mean), ("std", std)):
        wanted = card.input[name]
        if len(given) != 3 or any(abs(mine - other) > INPUT_TOLERANCE for mine, other in zip(given, wanted)):
            raise UserError(
                f"the backbone was trained with {name} {shown(wanted)} in {trained_order}, "
                f"now {name} is {shown(given)} in {order}; set it to the backbone's"
            )
    if order != trained_order:
        raise UserError(
            f"the backbone was trained on {trained_order} images, now they are {order}; "
            f"set the input format to {trained_order}"
        )


def check_pixels(card: Card, mean: Sequence[float], std: Sequence[float], order: str, source: str) -> None:
    """As :func:`check_input_contract` for a detector's MODEL.PIXEL_MEAN and PIXEL_STD (0..255) and INPUT.FORMAT.

    The line begins with ``source`` and ends with the values to set.
    """
    try:
        check_input_contract(card, [value / 255 for value in mean], [value / 255 for value in std], order)
    except UserError as error:
        wanted = {name: [round(255 * value, 3) for value in card.input[name]] for name in ("mean", "std")}
        raise UserError(
            f"{source}: {error} (INPUT.FORMAT {card.input['channel_order']}, "
            f"MODEL.PIXEL_MEAN {wanted['mean']}, MODEL.PIXEL_STD {wanted['std']})"
        ) from error
