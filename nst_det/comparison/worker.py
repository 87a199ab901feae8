"""Runs a command of nst-det in a process that never outlives the comparison that started it.

``python -m nst_det.comparison.worker PARENT_PID COMMAND ...`` is ``nst-det COMMAND ...``, except that it ends when its
parent does.
"""

from __future__ import annotations

import sys

from nst_det.engine.signals import end_with_parent


def main() -> None:
    """Watch the parent, then run the command."""
    end_with_parent(int(sys.argv[1]))
    from nst_det.cli import main as run_command

    sys.argv = ["nst-det", *sys.argv[2:]]
    run_command()


if __name__ == "__main__":
    main()
