"""``python -m lightning_dropreg`` is the command ``dropreg``."""

import sys

from lightning_dropreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
