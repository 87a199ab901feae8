"""SIGTERM and SIGINT as a scheduler means them: finish the step, save it, and exit with :data:`EXIT_RESUME`.

The same command resumes, on the CPU to the same bits.  A second signal doesn't wait for the step: then the run resumes
from the checkpoint before.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# EX_TEMPFAIL of <sysexits.h>, which job scripts know as "try again later"
EXIT_RESUME = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5


class Preempted(KeyboardInterrupt):
    """A signal asked to stop, and what is done is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """The signal that asks to stop after this step; 0 until one comes."""

    signum = 0


@contextmanager
def preemptible(once: bool = False) -> Iterator[None]:
    """Within the block both signals raise :class:`Preempted` at once; for what is between the training loops.

    With ``once`` all later signals are ignored, so that what the first one stopped can end in order.
    """

    def stop(signum: int, _frame: FrameType | None) -> None:
        for number in SIGNALS if once else ():
            signal.signal(number, signal.SIG_IGN)
        raise Preempted(signum)

    with _handled(stop):
        yield


@contextmanager
def whole_steps() -> Iterator[StopRequest]:
    """Within the block the first signal is kept for the end of the step, a second one raises :class:`Preempted`."""
    request = StopRequest()

    def keep(signum: int, _frame: FrameType | None) -> None:
        if request.signum:
            raise Preempted(signum)
        request.signum = signum

    with _handled(keep):
        try:
            yield request
        except RuntimeError as error:
            # schedulers may signal all processes, and this is how torch reports a loader process that is gone
            if request.signum:
                raise Preempted(request.signum) from error
            raise
    # one that came during the last step
    if request.signum:
        raise Preempted(request.signum)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may set handlers, and it alone gets signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent, which was ``parent`` when it started, ends in any way."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os._exit(1)

    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=watch, daemon=True).start()
    # it may have ended before the kernel was asked
    if os.getppid() != parent:
        os._exit(1)
