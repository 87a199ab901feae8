"""``python -m nst_det`` is the same program as ``nst-det``."""

from nst_det.cli import main

if __name__ == "__main__":
    main()
