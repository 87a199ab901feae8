"""Runs one word of the command line in a process that never outlives the comparison that started it.

``python -m nst_det.compare.child PARENT_PID WORD ...`` is ``nst-det WORD ...``, except that it ends when its
parent does, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5


def end_with_parent(parent: int) -> None:
    """See to it that this process is killed when process ``parent`` ends.

    Linux's kernel does it; elsewhere a thread looks whether the parent is still the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # it may have ended before the kernel was asked
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Watch the parent, then do the word."""
    end_with_parent(int(sys.argv[1]))
    from nst_det.cli import main as run_word

    sys.argv = ["nst-det", *sys.argv[2:]]
    run_word()


if __name__ == "__main__":
    main()
