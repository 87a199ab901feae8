"""The grammar of methods: ``ce``, ``kd``, ``nst-poly:50+kd:0.9``."""

from collections.abc import Iterator
from dataclasses import dataclass

from nst_det.losses.registry import check_term, check_weight, term_names

LABELS_ONLY = "ce"


@dataclass(frozen=True)
class Method:
    """A sum of transfer terms with their weights; two are equal exactly if their canonical forms (``word``) are.

    Cross-entropy with the labels is the task and always there; the method ``ce`` is the one without any term.

    Attributes:
        weights: term to its weight, None where the method gives none; in the registry's order.
    """

    weights: tuple[tuple[str, float | None], ...] = ()

    @property
    def word(self) -> str:
        """The canonical form."""
        parts = (name if weight is None else f"{name}:{_shortest(weight)}" for name, weight in self.weights)
        return "+".join(parts) or LABELS_ONLY

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its terms."""
        return tuple(name for name, _ in self.weights)

    def __iter__(self) -> Iterator[tuple[str, float | None]]:
        return iter(self.weights)

    def __str__(self) -> str:
        return self.word


def _shortest(weight: float) -> str:
    # a plus sign would read as the next term
    return repr(float(weight)).removesuffix(".0").replace("e+", "e")


def parse_method(word: str | Method) -> Method:
    """The method of a ``word``: term names joined by ``+``, each with ``:weight`` if it isn't to be the default.

    Its terms are in the registry's order; ``ce`` has none.  A ValueError names an empty string, an unknown or repeated
    term, or a weight that isn't a finite number >= 0.

    Example:
        >>> parse_method("nst-poly+kd:0.9").word
        'kd:0.9+nst-poly'
    """
    if isinstance(word, Method):
        return word
    text = str(word).strip().lower()
    if text == LABELS_ONLY:
        return Method()
    found: dict[str, float | None] = {}
    for part in text.split("+"):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if not name:
            raise ValueError(f"method '{word}': a term is missing; write for example kd+nst-poly:50")
        if name == LABELS_ONLY:
            raise ValueError(f"method '{word}': ce (labels only) is in every method; leave it out of a sum")
        if name in found:
            raise ValueError(f"method '{word}': the term '{name}' is named twice")
        try:
            check_term(name)
            found[name] = check_weight(name, number) if colon else None
        except ValueError as error:
            raise ValueError(f"method '{word}': {error}") from None
    return Method(tuple((name, found[name]) for name in term_names() if name in found))
