"""What ends a command in one line, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave can't be used; the message is one line that names the file, the key and the remedy."""

    # which the command line exits with, as argparse does for a wrong option
    code = 2

    def __init__(self, message: str) -> None:
        # a loader process hands over its whole traceback; the line that was meant is its last
        line = message.rsplit(f"{type(self).__module__}.{type(self).__qualname__}: ", 1)[-1]
        super().__init__(" ".join(line.split()))


class RunFailed(Exception):
    """A run of a comparison ended with an error; ``code`` is what the command exits with.

    2: its input can't be used; 75: somebody stopped the run, the same command resumes it; 1: all else.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
