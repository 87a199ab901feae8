"""Weights fit a model whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

SHOWN = 4
# a counter that old files lack and frozen layers never read
OPTIONAL_SUFFIX = "num_batches_tracked"


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state_dict`` into ``model``.

    Nothing is copied unless all of it fits.

    Args:
        model: any module.
        state_dict: a state dict with the names and shapes that the model has.
        source: file or architecture, named in the error.

    Raises:
        ValueError: one line with the missing names, the unexpected names and the shapes that differ.
    """
    own = model.state_dict()
    check_shapes({key: tuple(value.shape) for key, value in state_dict.items()}, own, source)
    model.load_state_dict(dict(state_dict), strict=False)


def check_shapes(given: Mapping[str, Sequence[int]], own: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes, as :func:`load_strict` does, before any weight is read.

    Args:
        given: shapes by name.
        own: the model's state dict.
        source: file or architecture, named in the error.

    Raises:
        ValueError: they differ.
    """
    missing = [key for key in own if key not in given and not key.endswith(OPTIONAL_SUFFIX)]
    unexpected = [key for key in given if key not in own]
    shapes = [
        f"{key} {_size(given[key])} for {_size(own[key].shape)}"
        for key in own
        if key in given and tuple(given[key]) != tuple(own[key].shape)
    ]
    if missing or unexpected or shapes:
        parts = [_shown("missing", missing), _shown("unexpected", unexpected), _shown("other shapes", shapes)]
        raise ValueError(f"{source}: these weights don't fit the model: {'; '.join(part for part in parts if part)}")


def _size(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"


def _shown(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:SHOWN])}{more})"
