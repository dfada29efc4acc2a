"""The command `sparsegrad`, also `python -m sparsegrad.cli`."""

from __future__ import annotations

import sys

from sparsegrad.cli.console import main

if __name__ == "__main__":
    sys.exit(main())
