"""Where the checkout keeps what the experiments read and write."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
DATA = ROOT / "experiments" / "data"  # published figures, and the authors' logs
SCALES = ("paper", "mini")  # whose models: the paper's, or small ones with real weights
