"""Calibration: from the gradients of some batches to one basis per layer kind (paper, section 3.1).

`gradients.py` collects the gradients, and `grams.py` decomposes them.
"""

from sparsegrad.calibration.gradients import calibrate
from sparsegrad.calibration.grams import Grams, hosvd
from sparsegrad.calibration.loss import Batch

__all__ = ["Batch", "Grams", "calibrate", "hosvd"]
