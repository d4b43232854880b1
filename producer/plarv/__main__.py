"""``python -m plarv``: the command ``argus``."""

import sys

from plarv.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
