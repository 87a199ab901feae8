"""How a command is declared: its arguments in a decorator, its name and help by the function that it decorates."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nst_det.errors import UserError

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


class Existing(str):
    """The name of something that has to be there, or ``backbone://NAME``."""

    what = ""

    def check(self) -> None:
        """Refuse what isn't there, by a line that ends with what is to be named."""
        if self.startswith("backbone:"):
            from nst_det.models.registry import resolve

            resolve(self)
        elif not Path(self).expanduser().exists():
            raise UserError(f"{self}: no such file or folder; name {self.what}")


def existing(what: str) -> Callable[[str], Existing]:
    """Return the ``type`` of an argument that names something that has to be there; see :func:`check_existing`."""

    def named(path: str) -> Existing:
        found = Existing(path)
        found.what = what
        return found

    return named


def check_existing(args: argparse.Namespace) -> None:
    """Refuse what isn't there, before a command imports torch, which takes seconds; the rest becomes plain text."""
    for name, value in vars(args).items():
        items = value if isinstance(value, list) else [value]
        found = [item for item in items if isinstance(item, Existing)]
        for item in found:
            item.check()
        if found:
            setattr(args, name, list(map(str, items)) if isinstance(value, list) else str(value))


def flag(name: str, help: str) -> Argument:
    """Return an option without a value."""
    return lambda parser: parser.add_argument(name, action="store_true", help=help)


def one_of(*arguments: Argument, required: bool = True) -> Argument:
    """Return arguments of which exactly one must be given, or at most one."""

    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for add_to in arguments:
            add_to(group)

    return add


class _Setting(argparse.Action):
    """An option that stands for KEY VALUE; its ``dest`` is the key."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.settings = [*getattr(namespace, "settings", []), self.dest, values]


def setting(name: str, key: str, metavar: str, help: str) -> Argument:
    """Return an option for a key of the config that is set often."""
    return argument(name, metavar, help, dest=key, action=_Setting, default=argparse.SUPPRESS)


class _Words(argparse.Action):
    """The rest of the command line: the config, unless ``--config-file`` names it, options behind it, and the pairs."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if namespace.config_file is None:
            if not values:
                parser.error("name PROJECT, or a YAML by --config-file")
            namespace.config_file = values[0]
            # argparse leaves options to the rest as well
            parser.parse_args(values[1:], namespace)
            return
        setattr(namespace, self.dest, [*getattr(namespace, "settings", []), *values])


def config(name: str, what: str, dest: str = "overrides") -> Argument:
    """Return the arguments of a command that takes a config: a YAML, or a folder with one of this ``name``."""

    def add(parser: argparse._ActionsContainer) -> None:
        help = f"a project's folder with {name} in it, or a YAML; then keys with other values, lists with commas"
        parser.add_argument("--config-file", metavar="FILE", help=f"{what}, in place of PROJECT")
        parser.add_argument(dest, metavar="PROJECT [KEY VALUE]", help=help, nargs=argparse.REMAINDER, action=_Words)

    return add


RUN = existing("the folder of a finished detector run")
BACKBONE = existing("a backbone file; nst-det backbones lists those there are")
METHODS = setting("--methods", "METHODS", "LIST", "transfer methods, such as ce,nst-poly")
SEEDS = setting("--seeds", "SEEDS", "LIST", "seeds, such as 0,1,2")
JOBS = argument("--jobs", "N", "runs side by side (default: cores, or GPUs)", type=int, default=0)
DEVICE = argument("--device", "NAME", "cpu or cuda (default: the GPU if there is one)", default="")
TRUST_PICKLE = flag("--trust-pickle", "open pickles with more than tensors in them; such a file can run any code")


def with_trust(values: list[str], args: argparse.Namespace, *prefixes: str) -> list[str]:
    """Return KEY VALUE pairs and what ``--trust-pickle`` means as one, once for each prefix (``DISTILL.``)."""
    trust = [text for prefix in prefixes for text in (f"{prefix}TRUST_PICKLE", "True")]
    return [*values, *(trust if args.trust_pickle else [])]
