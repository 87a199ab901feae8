"""What stands in the registry, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from nst_det.backbones.card import Card
from nst_det.backbones.files import load_card
from nst_det.errors import UserError


def list_backbones(folders: Sequence[Path]) -> tuple[list[tuple[str, Card]], list[str]]:
    """Names and cards of all backbones in ``folders``, and one line for each file that can't be used."""
    found: dict[str, Card] = {}
    faults = []
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            if path.stem in found:
                continue
            try:
                found[path.stem] = load_card(path)
            except UserError as error:
                faults.append(str(error))
    return sorted(found.items()), faults


def backbones_table(entries: Sequence[tuple[str, Card]], title: str) -> Table:
    """A rich table: name, architecture, method, accuracy, size, teacher, data, date."""
    table = Table(title=title, title_justify="left")
    for heading in ("name", "arch", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("top-1", "params"):
        table.add_column(heading, justify="right")
    for heading in ("teacher", "data", "date"):
        table.add_column(heading, overflow="fold")
    for name, card in entries:
        top1 = "" if card.top1 is None else f"{100 * card.top1:.1f} %"
        params = "" if card.params is None else f"{card.params / 1e6:.2f} M"
        teacher, data = str(card.teacher.get("name", "")), str(card.data.get("name", ""))
        # Text, not markup: names come from files
        table.add_row(
            *(_plain(text) for text in (name, card.arch, card.method, top1, params, teacher, data, card.date[:10]))
        )
    return table


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape("".join(character if character.isprintable() else "?" for character in text))
