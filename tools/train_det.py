"""Stage two: the same as ``nst-det train-det``."""

import sys

from nst_det.cli import main

if __name__ == "__main__":
    main(["train-det", *sys.argv[1:]])
