"""MT-Bench: a model's answers to two-turn questions, and a judge's grades of them (Table 6 and Appendix E).

The commands are `python -m experiments.mtbench answer | judge | show`; see docs/mtbench.md. `compute_scores` and
`side_by_side` return the data of tables and pages.
"""

from sparsegrad import interrupt as interrupt  # first: Ctrl-C while torch is imported ends in one line

# isort: split
from experiments.mtbench.scores import ModelScores, SideBySide, compute_scores, side_by_side

__all__ = ["ModelScores", "SideBySide", "compute_scores", "side_by_side"]
