"""The words that a user types: ``nst-det WORD ...``.  Each word is one module of ``nst_det.commands``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from nst_det import __version__, commands
from nst_det.engine.io import cannot_write
from nst_det.engine.signals import EXIT_RESUME, Preempted, preemptible
from nst_det.errors import UserError

# argparse uses the same code for a wrong option
EXIT_BAD_INPUT = 2
# disk, quota or largest file size
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# 128 + SIGINT, what a shell reports for an interrupted program
EXIT_INTERRUPTED = 130


def command_modules() -> dict[str, ModuleType]:
    """All command modules by the word that calls them (``check_data`` is called by ``check-data``)."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{commands.__name__}.{name}") for name in names}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every word.

    A command module has HELP, ``add_arguments(parser)`` and ``run(args)``; one that goes on where it was stopped has
    ``RESUMES = True`` too.
    """
    parser = argparse.ArgumentParser(
        prog="nst-det", description="Transfer knowledge to a small detector and measure what it brings."
    )
    parser.add_argument("--version", action="version", version=f"nst-det {__version__}")
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for word, module in command_modules().items():
        sub = words.add_parser(word, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, resumes=getattr(module, "RESUMES", False))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one word and leave with its exit code.

    0 done; 2 the input can't be used; 75 stopped by SIGTERM or SIGINT, with all saved that the same command needs to
    go on; 130 interrupted.
    """
    args = build_parser().parse_args(argv)
    # said by fvcore when it is imported; nothing that a user could mend
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    try:
        with preemptible() if args.resumes else contextlib.nullcontext():
            code = args.run(args)
    except UserError as error:
        if _speaks():
            print(f"nst-det: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except OSError as error:
        # whatever wrote last: a library's events, a log, a file of somebody else's
        if error.errno not in FULL:
            raise
        print(f"nst-det: {cannot_write(error.filename or 'output', str(error.strerror))}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except Preempted as stop:
        if _speaks():
            said = f"stopped by {stop}; what is done is saved, the same command goes on from here"
            print(f"nst-det: {said}", file=sys.stderr)
        code = EXIT_RESUME
    except KeyboardInterrupt:
        print("nst-det: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _speaks() -> bool:
    """Of several processes of torchrun's one says why they end."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from nst_det.engine.distributed import speaks_of_error

    return speaks_of_error()
