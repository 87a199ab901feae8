"""How a command is declared: its arguments in a decorator, its name and help by the function that it decorates."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Argument = Callable[[argparse._ActionsContainer], object]
# gives the exit code; None is 0
Run = Callable[[argparse.Namespace], int | None]


@dataclass(frozen=True)
class Command:
    """A command; one that ``resumes`` continues, when it is called again, where it was stopped."""

    run: Run
    arguments: tuple[Argument, ...]
    epilog: str
    resumes: bool


# by name, as the modules of this package declare them
COMMANDS: dict[str, Command] = {}


def command(*arguments: Argument, epilog: str = "", resumes: bool = False) -> Callable[[Run], Run]:
    """Make the decorated function a command: ``check_data`` is ``nst-det check-data``, its docstring is the help."""

    def declare(run: Run) -> Run:
        COMMANDS[run.__name__.replace("_", "-")] = Command(run, arguments, epilog, resumes)
        return run

    return declare


def argument(names: str, metavar: str | None, help: str, **options: Any) -> Argument:
    """Return an argument with ``options`` of ``ArgumentParser.add_argument``; a space separates several names."""
    return lambda parser: parser.add_argument(*names.split(), metavar=metavar, help=help, **options)


def flag(name: str, help: str) -> Argument:
    """Return an option without a value."""
    return lambda parser: parser.add_argument(name, action="store_true", help=help)


def one_of(*arguments: Argument) -> Argument:
    """Return arguments of which exactly one must be given."""

    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=True)
        for add_to in arguments:
            add_to(group)

    return add


def config_values(name: str, help: str = "keys of the config with other values") -> Argument:
    """Return the rest of the command line as KEY VALUE pairs."""
    return argument(name, "KEY VALUE", help, nargs=argparse.REMAINDER)


JOBS = argument("--jobs", "N", "runs side by side (default: cores, or GPUs)", type=int, default=0)
DEVICE = argument("--device", "NAME", "cpu or cuda (default: the GPU if there is one)", default="")
TRUST_PICKLE = flag("--trust-pickle", "open pickles with more than tensors in them; such a file can run any code")


def with_trust(values: list[str], args: argparse.Namespace, *prefixes: str) -> list[str]:
    """Return KEY VALUE pairs and what ``--trust-pickle`` means as one, once for each prefix (``DISTILL.``)."""
    trust = [text for prefix in prefixes for text in (f"{prefix}TRUST_PICKLE", "True")]
    return [*values, *(trust if args.trust_pickle else [])]
