"""The words that a user types: ``nst-det WORD ...``.  Each word is one module of ``nst_det.commands``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from nst_det import __version__, commands
from nst_det.errors import UserError

# argparse uses the same code for a wrong option
EXIT_BAD_INPUT = 2
# 128 + SIGINT, what a shell reports for an interrupted program
EXIT_INTERRUPTED = 130


def command_modules() -> dict[str, ModuleType]:
    """All command modules by the word that calls them (``check_data`` is called by ``check-data``)."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{commands.__name__}.{name}") for name in names}


def build_parser() -> argparse.ArgumentParser:
    """The parser with every word.  A command module has HELP, ``add_arguments(parser)`` and ``run(args)``."""
    parser = argparse.ArgumentParser(
        prog="nst-det", description="Transfer knowledge to a small detector and measure what it brings."
    )
    parser.add_argument("--version", action="version", version=f"nst-det {__version__}")
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for word, module in command_modules().items():
        sub = words.add_parser(word, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one word and leave with its exit code: 0 done, 2 the input can't be used, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
    except UserError as error:
        print(f"nst-det: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("nst-det: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)
