"""Folders of the checkout that the experiments use."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
DATA = ROOT / "experiments" / "data"  # published numbers and the authors' logs
SCALES = ("paper", "mini")  # the paper's models, or small models with real weights
