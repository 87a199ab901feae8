"""One module a word of the command line; importing them must stay cheap, so heavy imports stand in ``run``."""

from __future__ import annotations

import argparse


def add_trust_pickle(parser: argparse.ArgumentParser) -> None:
    """The option ``--trust-pickle`` of the words that read somebody else's weights."""
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="open weights that are pickles with more than tensors in them; such a file can run any code",
    )


def trust_words(args: argparse.Namespace, *prefixes: str) -> list[str]:
    """What ``--trust-pickle`` means as KEY VALUE words, once for each prefix (``DISTILL.``)."""
    return [word for prefix in prefixes for word in (f"{prefix}TRUST_PICKLE", "True")] if args.trust_pickle else []
