"""The command line, ``nst-det COMMAND ...``; all commands are imported for a help page, so they import inside."""

import argparse
import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Sequence

from nst_det import __version__
from nst_det.cli import analysis, data, inference, training  # noqa: F401
from nst_det.cli.command import COMMANDS, check_existing
from nst_det.engine.signals import EXIT_RESUME, Preempted, end_with_parent, preemptible
from nst_det.errors import RunFailed, UserError

# disk, quota or largest file size
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# 128 + SIGINT, what a shell reports for an interrupted program
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="nst-det", description="Transfer knowledge to a small detector and measure what it brings."
    )
    parser.add_argument("--version", action="version", version=f"nst-det {__version__}")
    # how a comparison starts its runs, so that none outlives it
    parser.add_argument("--end-with-parent", type=int, metavar="PID", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in sorted(COMMANDS.items()):
        sub = commands.add_parser(
            name, help=command.run.__doc__, description=command.run.__doc__, epilog=command.epilog
        )
        for add_to in command.arguments:
            add_to(sub)
        sub.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    0 done; 1 a run of a comparison failed; 2 the input can't be used; 75 stopped by SIGTERM or SIGINT, with all saved
    that the same command needs to resume; 130 interrupted.
    """
    # fvcore causes it when it is imported; nothing that a user could mend
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    try:
        args = build_parser().parse_args(argv)
        # Detectron2's launch sends the arguments to its processes, where no function of a command can go
        command = vars(args).pop("command")
        check_existing(args)
        if args.end_with_parent:
            end_with_parent(args.end_with_parent)
        with preemptible() if command.resumes else contextlib.nullcontext():
            code = command.run(args) or 0
    except (UserError, RunFailed) as error:
        _print_error(error)
        code = error.code
    except OSError as error:
        # any writer: a library's events, a log, a file of somebody else's
        if error.errno not in FULL:
            raise
        from nst_det.engine.io import cannot_write

        _print_error(cannot_write(error.filename or "output", str(error.strerror)))
        code = UserError.code
    except Preempted as stop:
        _print_error(f"stopped by {stop}; everything is saved; run the same command to resume")
        code = EXIT_RESUME
    except KeyboardInterrupt:
        _print_error("interrupted")
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _print_error(line: object) -> None:
    """Print why the command ends; of several processes of torchrun's one does."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from nst_det.engine.distributed import speaks_of_error

        if not speaks_of_error():
            return
    print(f"nst-det: {line}", file=sys.stderr)
