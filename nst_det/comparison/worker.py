"""Runs one word of the command line in a process that never outlives the comparison that started it.

``python -m nst_det.comparison.worker PARENT_PID WORD ...`` is ``nst-det WORD ...``, except that it ends when its
parent does.
"""

from __future__ import annotations

import sys

from nst_det.engine.signals import end_with_parent


def main() -> None:
    """Watch the parent, then do the word."""
    end_with_parent(int(sys.argv[1]))
    from nst_det.cli import main as run_word

    sys.argv = ["nst-det", *sys.argv[2:]]
    run_word()


if __name__ == "__main__":
    main()
