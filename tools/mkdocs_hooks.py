"""What MkDocs is told beyond mkdocs.yml: links that lead out of docs/ into the checkout.

On a page of the site such a link leads nowhere, so it becomes the file's path as text; a file that isn't there stops a
strict build, as a broken link does.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

# with MkDocs' own prefix, strict mode counts its warnings
log = logging.getLogger("mkdocs.plugins.outside")
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Turn ``[text](../outside.md)`` into ``text (`outside.md`)``."""
    docs = Path(config["docs_dir"])
    checkout = docs.parent

    def plain(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(docs / Path(page.file.src_uri).parent / match[2]))
        if target.is_relative_to(docs):
            return match[0]
        if not target.exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, match[2])
        path = f"`{target.relative_to(checkout).as_posix()}`"
        return path if match[1].strip("`") == path.strip("`") else f"{match[1]} ({path})"

    return LINK.sub(plain, markdown)
