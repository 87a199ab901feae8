"""What ends a command in one line, without a traceback."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return ``text`` with its control characters, and all else that a terminal can't show, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UserError(Exception):
    """Something the user gave can't be used; the message is one line that names the file, the key and the remedy."""

    # which the command line exits with, as argparse does for a wrong option
    code = 2

    def __init__(self, message: str) -> None:
        # a loader process hands over its whole traceback; the line that was meant is its last
        line = message.rsplit(f"{type(self).__module__}.{type(self).__qualname__}: ", 1)[-1]
        super().__init__(printable(" ".join(line.split())))


class RunFailed(Exception):
    """A run of a comparison ended with an error; ``code`` is what the command exits with.

    2: its input can't be used; 75: somebody stopped the run, the same command resumes it; 1: all else.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
