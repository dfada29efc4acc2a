"""Eigenvectors of a Gram matrix whose usual decomposition would need too much memory.

LLaMA's MLP has 11008 features on a side. The usual solver (divide and conquer) holds three to four float64 matrices of
that size, 2.9 to 3.9 GB. The MRRR solver (LAPACK `syevr`) holds the matrix, which it overwrites, and the result, 1.9 GB
in all. Its columns are orthogonal to 6e-11 instead of 2e-14. On a CPU it took 0.75 to 1.25 times as long as the usual
solver (3072 and 2752 features). On a GPU the usual solver is fast, so this one is used only for what does not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE_SIDE = {"cpu": 2048, "elsewhere": 8192}  # features; a larger side uses the solver below, in host memory


def is_large(size: int, device: torch.device) -> bool:
    """Whether a side of `size` features, with its Gram matrix on `device`, uses `large_eigenvectors`."""
    return size > LARGE_SIDE["cpu" if device.type == "cpu" else "elsewhere"]


def large_eigenvectors(matrix: Tensor) -> Tensor:
    """Columns (n, n) = eigenvectors by increasing eigenvalue, on the CPU in float64; `matrix` is overwritten.

    Args:
        matrix: symmetric (n, n), float64, contiguous, on the CPU.
    """
    try:
        from scipy.linalg import eigh
    except ImportError:  # scipy is optional: the usual solver gives the same result with more memory
        return torch.linalg.eigh(matrix).eigenvectors  # type: ignore[no-any-return]
    # The transpose of a row-major array is column-major, as LAPACK expects; otherwise scipy would work on a copy.
    _, vectors = eigh(matrix.numpy().T, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(vectors)


def to_host(gram: Tensor) -> Tensor:
    """A float64 copy in host memory. Moved before the cast, so that no float64 copy is allocated on the GPU."""
    return gram.cpu().to(torch.float64, copy=True)
