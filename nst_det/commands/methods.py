"""``nst-det methods``: the terms that a method can be made of."""

from __future__ import annotations

import argparse

HELP = "list the transfer terms, their default weights and where these are from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the word."""
    parser.add_argument("method", nargs="?", help="only the terms of this method, for example kd+nst-poly")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from nst_det.detection.config import detector_transfer_node
    from nst_det.errors import UserError
    from nst_det.losses import parse_method, terms

    try:
        chosen: dict[str, float | None] = dict(parse_method(args.method)) if args.method else dict.fromkeys(terms())
    except ValueError as error:
        raise UserError(str(error)) from None
    table = Table(title="Transfer terms; join them with +, weigh them as in kd:0.9+nst-poly", expand=False)
    for column in ("term", "reads", "weight", "the weight is from", "hands over", "options"):
        table.add_column(column, justify="right" if column == "weight" else "left")
    for name, weight in chosen.items():
        term = terms()[name]
        reads = term.level if term.student_kind == term.level else f"{term.student_kind} to {term.level}"
        options = ", ".join(f"{key}={value}" for key, value in term.options.items())
        source = term.source if weight is None else "the method's word"
        table.add_row(name, reads, f"{term.weight if weight is None else weight:g}", source, term.summary, options)
    there = "; ".join(
        f"{name} has {key}={value} there"
        for name, own in detector_transfer_node().OPTIONS.items()
        for key, value in own.items()
    )
    table.caption = (
        "Maps are feature levels of both backbones. Logits and embedding are the classifiers' in stage one, in stage "
        f"two those of both box heads on the student's proposals ({there})."
    )
    Console().print(table)
    return 0
