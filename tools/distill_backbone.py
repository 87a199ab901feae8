"""Stage one: the same as ``nst-det distill``."""

import sys

from nst_det.cli import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
