"""The words of METHODS: terms of stage one, and terms of stage two marked by ``@det``.

``kd+nst-poly`` distills the backbone.  ``cwd@det`` starts from the backbone ``ce`` and lets the detector learn from a
teacher detector while it trains.  ``nst-poly+cwd@det:5`` does both.
"""

from __future__ import annotations

from dataclasses import dataclass

from nst_det.transfer import LABELS_ONLY, Method, parse_method

MARK = "@det"


@dataclass(frozen=True)
class RowMethod:
    """Where the terms of one row work.

    Attributes:
        backbone: the method of stage one; ``ce`` where the word names none.
        detector: the method of stage two, without its marks; ``ce`` where it names none.
    """

    backbone: Method
    detector: Method

    @property
    def word(self) -> str:
        """The canonical word: two rows are equal exactly if their words are."""
        parted = [term.partition(":") for term in self.detector.word.split("+") if self.detector.names]
        marked = [name + MARK + colon + weight for name, colon, weight in parted]
        return "+".join([*([self.backbone.word] if self.backbone.names or not marked else []), *marked])


def parse_row(word: str) -> RowMethod:
    """A row's method from its word.

    Args:
        word: terms joined by ``+``, each with ``@det`` where it works in stage two and with ``:weight`` where that
            isn't to be the configured one.

    Raises:
        ValueError: a word that isn't one, see :func:`nst_det.transfer.parse_method`.

    Example:
        >>> row = parse_row("cwd@det:5+nst-poly")
        >>> row.word, row.backbone.word, row.detector.word
        ('nst-poly+cwd@det:5', 'nst-poly', 'cwd:5')
    """
    places: dict[str, list[str]] = {"": [], "det": []}
    for term in str(word).strip().lower().split("+"):
        name, colon, weight = term.partition(":")
        name, _, place = (part.strip() for part in name.partition("@"))
        if not name or place not in places or "@" in term.removeprefix(f"{name}{MARK}").removeprefix(name):
            raise ValueError(f"method '{word}': write a term as name, name:weight, name{MARK} or name{MARK}:weight")
        places[place].append(name + colon + weight)
    row = RowMethod(*(parse_method("+".join(terms) or LABELS_ONLY) for terms in places.values()))
    if places["det"] and not row.detector.names:
        raise ValueError(f"method '{word}': ce (labels only) learns from no teacher; leave out {MARK}")
    return row
