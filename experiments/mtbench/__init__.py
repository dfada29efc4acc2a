"""MT-Bench: answers of a model to two-turn questions, and their grades by a judge (the paper's Table 6, Appendix E).

`python -m experiments.mtbench answer | judge | show`; docs/mtbench.md says how. `compute_scores` and `side_by_side`
give the data of tables and pages.
"""

from experiments.mtbench.scores import ModelScores, SideBySide, compute_scores, side_by_side

__all__ = ["ModelScores", "SideBySide", "compute_scores", "side_by_side"]
