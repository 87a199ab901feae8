"""Docstrings are plain text with Sphinx roles; here they become what the reference's Markdown needs.

``:func:`~package.name``` becomes a link, ``:data:`NAME``` code (constants have no entry of their own), ``Example:`` the
section that shows code as code, and a table of reStructuredText a block as it was typed.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
NAME = re.compile(r":(?:data|attr):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# "text::" and the indented block below it
LITERAL = re.compile(r"^(.*):: *\n\n((?:(?: {4}.*)?\n)*(?: {4}.*))", re.MULTILINE)
# lines of = around the columns
TABLE = re.compile(r"^=+ +=+.*\n(?:.*\n)*?=+ +=+.*$", re.MULTILINE)


def markdown(text: str) -> str:
    """A docstring as Markdown.

    Example:
        >>> markdown("See :func:`~nst_det.api.compare` and :data:`KINDS`.")
        'See [`compare`][nst_det.api.compare] and `KINDS`.'
    """
    text = TABLE.sub(lambda match: f"```text\n{match[0]}\n```", text)
    text = LITERAL.sub(lambda match: f"{match[1]}:\n\n```python\n{_dedented(match[2])}\n```", text)
    text = EXAMPLE.sub("Examples:", text)
    text = NAME.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return ROLE.sub(lambda match: f"[`{match[1].rpartition('.')[2]}`][{match[1]}]", text)


def _dedented(text: str) -> str:
    return "\n".join(line[4:] for line in text.rstrip().split("\n"))


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object once its members are there."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
