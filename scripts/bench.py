"""`python -m experiments.bench` from a checkout that is not installed: `python scripts/bench.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.bench.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
