"""Batches to bases: gradients of the MLP weights, and their HOSVD (paper, section 3.1)."""

from sparsegrad.calibration.gradients import Batch, calibrate
from sparsegrad.calibration.grams import Grams, hosvd

__all__ = ["Batch", "Grams", "calibrate", "hosvd"]
