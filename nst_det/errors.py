"""The one exception that means: the input is wrong, the program is not."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave can't be used.

    The message is one line that names the file, the field and the remedy.  The command line prints it
    without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # a loader process hands over its whole traceback; the line that was meant stands at its end
        line = message.rsplit(f"{type(self).__module__}.{type(self).__qualname__}: ", 1)[-1]
        super().__init__(" ".join(line.split()))
