"""Bases that need no calibration, for shapes whose calibration would take longer than all measurements.

A Householder reflection I - 2 v v^T / v^T v is a dense orthogonal matrix. The cost of a step does not depend on which
orthogonal matrices it multiplies by, so time and memory equal those of calibrated bases. The training result does not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments.bench.shapes import Shape, build_model, mlp_linears
from sparsegrad.basis import Basis, save_bases
from sparsegrad.targets import weight_shapes

BASES = ("calibrated", "reflections")


def write(shape: Shape, path: Path) -> Path:
    """Write the bases of all layer kinds of `shape` in float32 unless the file exists; returns its path."""
    if not path.is_file():
        with torch.device("meta"):  # only the shapes are needed
            shapes = weight_shapes(mlp_linears(shape, build_model(shape, 1, torch.float32)))
        made = {kind: Basis(reflection(columns, 0), reflection(rows, 1)) for kind, (rows, columns) in shapes.items()}
        save_bases(path, made, "reflections")
    return path


def reflection(size: int, seed: int) -> Tensor:
    """A dense orthogonal matrix (size, size), float32."""
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    v /= v.norm()
    return torch.eye(size).addr_(v, v, alpha=-2.0)
