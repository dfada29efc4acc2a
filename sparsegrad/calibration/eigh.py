"""Eigenvectors of a Gram that is too large for the usual solver's workspace: LLaMA's MLP has 11008 features on a side.

The usual solver (divide and conquer) holds three to four matrices of the Gram's size in float64: 2.9 to 3.9 GB for
11008 features. The solver by relatively robust representations needs the matrix, which it destroys, and the result:
1.9 GB, and columns that are orthogonal to 6e-11 instead of 2e-14. On a CPU it took three quarters to five quarters of
the usual one's time (3072 and 2752 features). On a GPU the usual one is fast, so this one is for what does not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE_SIDE = {"cpu": 2048, "elsewhere": 8192}  # features; a larger side is decomposed here, in host memory


def is_large(size: int, device: torch.device) -> bool:
    """Whether a side of `size` features, whose sum is on `device`, is decomposed here."""
    return size > LARGE_SIDE["cpu" if device.type == "cpu" else "elsewhere"]


def large_eigenvectors(matrix: Tensor) -> Tensor:
    """Columns (n, n) = eigenvectors by rising eigenvalue, on the CPU in float64; `matrix` is destroyed.

    Args:
        matrix: symmetric (n, n), float64, contiguous, on the CPU.
    """
    try:
        from scipy.linalg import eigh
    except ImportError:  # a machine for benchmarks alone may lack it; the usual solver does the same with more memory
        return torch.linalg.eigh(matrix).eigenvectors  # type: ignore[no-any-return]
    # Transposed, it has the layout of LAPACK: otherwise scipy would work on a copy.
    _, vectors = eigh(matrix.numpy().T, driver="evr", overwrite_a=True, check_finite=False)
    return torch.from_numpy(vectors)


def to_host(gram: Tensor) -> Tensor:
    """A float64 copy in host memory; from a GPU first moved, so that nothing of float64 is made there."""
    return gram.cpu().to(torch.float64, copy=True)
