"""SIGTERM and SIGINT as a scheduler means them: finish the step, save it, and say that this can go on.

A training command that was stopped so exits with :data:`EXIT_RESUME`; the same command resumes it, on the CPU to the
same bits.  A second signal doesn't wait for the step: then the run resumes from the checkpoint before.
"""

from __future__ import annotations

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

_Handler = Callable[[int, FrameType | None], None]
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5


class Preempted(KeyboardInterrupt):
    """A signal asked to stop, what is done is saved; in Python an interrupt like Ctrl-C's.

    Attributes:
        signum: which signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """What :func:`whole_steps` gives; :attr:`signum` is the signal that came, 0 until then."""

    def __init__(self) -> None:
        self.signum = 0

    @property
    def asked(self) -> bool:
        """Whether to stop after this step."""
        return self.signum != 0

    def obey(self) -> None:
        """Stop now; everything is saved.

        Raises:
            Preempted: always.
        """
        raise Preempted(self.signum)


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
    """Within the block the first signal is kept for the end of the step, a second one raises :class:`Preempted`.

    The loop looks at ``asked`` after each step, saves, and calls ``obey()``.

    Raises:
        Preempted: a signal came during the last step, or one ended a loader process (schedulers may signal all).

    Example:
        >>> with whole_steps() as stop:
        ...     for step in range(3):
        ...         if stop.asked:
        ...             stop.obey()
    """
    request = StopRequest()

    def keep(signum: int, _frame: FrameType | None) -> None:
        if request.asked:
            raise Preempted(signum)
        request.signum = signum

    with _handled(keep):
        try:
            yield request
        except RuntimeError as error:
            # how torch reports a loader process that is gone; the step was not done, the checkpoint before it counts
            if request.asked:
                raise Preempted(request.signum) from error
            raise
    if request.asked:
        request.obey()


@contextmanager
def _handled(handler: _Handler) -> Iterator[None]:
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
    """See to it that this process is killed when process ``parent`` ends, however that ends.

    Linux's kernel does it; elsewhere a thread looks whether the parent is still the parent.

    Args:
        parent: the process that started this one; taken before, as it may be gone by now.

    Example:
        >>> end_with_parent(os.getppid())
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
