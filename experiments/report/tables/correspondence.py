"""Table 2: Linear and SparseGrad side by side, each row checked numerically in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from experiments.report.tables.base import Context, Table
from sparsegrad.basis import Basis
from sparsegrad.layers.rotated import SparseGradLinear

_SIZE, _OUT_FEATURES, _TOKENS = 24, 40, 16
TINY = 1e-10  # relative; anything smaller is rounding


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        row: its name.
        linear, paper, ours: formulas for a linear, for SparseGrad as printed, and for SparseGrad in our notation.
        printed, right: relative residuals of the printed formula and of the correct one.
    """

    row: str
    linear: str
    paper: str
    ours: str
    printed: float | None
    right: float


def checks() -> list[Check]:
    """All rows, evaluated on random matrices; the paper's U and V are our U^T and V^T."""
    square, general = _Case(_SIZE, _SIZE), _Case(_OUT_FEATURES, _SIZE)
    return [*general.rows(), square.grad_input(general)]


class _Case:
    """A random linear, its SparseGradLinear with every entry kept, and the gradients of both."""

    def __init__(self, out_features: int, in_features: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.U, self.V = (torch.linalg.qr(draw(n, n))[0] for n in (in_features, out_features))
        self.linear = nn.Linear(in_features, out_features, bias=False).double()
        self.linear.weight.data = draw(out_features, in_features)
        self.x, self.dy = draw(_TOKENS, in_features), draw(_TOKENS, out_features)
        self.layer = SparseGradLinear.from_linear(self.linear, Basis(self.U, self.V), density=1.0)
        self.y, self.dx, self.dW = self._run_backward(self.linear, self.linear.weight)
        self.y_layer, self.dx_layer, self.dW_rotated = self._run_backward(self.layer, self.layer.rotated_weight)
        self.W, self.W_rotated = self.linear.weight.detach(), self.layer.rotated_weight.detach()

    def _run_backward(self, module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output, input gradient, weight gradient) of a module."""
        x = self.x.clone().requires_grad_()
        y = module(x)
        y.backward(self.dy)
        assert x.grad is not None
        assert weight.grad is not None
        return y.detach(), x.grad, weight.grad.to_dense() if weight.grad.is_sparse else weight.grad

    def rows(self) -> list[Check]:
        """All rows except Grad Input."""
        x, dy, W, U, V = self.x, self.dy, self.W, self.U, self.V
        y_rotated = (self.x @ U @ self.W_rotated.T).requires_grad_()
        (y_rotated @ V.T).backward(dy)
        assert y_rotated.grad is not None
        weights = _residual(U.T @ W.T @ V, self.W_rotated.T)
        grad_weights = _worst((V.T @ dy.T @ x @ U, self.dW_rotated), (V.T @ self.dW @ U, self.dW_rotated))
        output = _worst((x @ U @ self.W_rotated.T @ V.T, self.y), (self.y_layer, self.y))
        grad_output = _residual(dy @ V, y_rotated.grad)
        inputs = _residual((x @ U) @ U.T, x)
        return [
            Check("Weights", "W^T", "~W^T = U W^T V^T", "W~^T = U^T W^T V", weights, weights),
            Check("Input", "X", "~X = X U^T", "X~ = X U", inputs, inputs),
            Check("Output", "Y = X W^T", "~Y = X U^T ~W^T V", "Y = X U W~^T V^T", output, output),
            Check("Grad Output", "dL/dY", "dL/dY V^T", "dL/dY V", grad_output, grad_output),
            Check("Grad Weights", "dL/dW = (dL/dY)^T X", "V (dL/dY)^T X U^T", "V^T (dL/dY)^T X U", grad_weights,
                  grad_weights),
        ]  # fmt: skip

    def grad_input(self, general: _Case) -> Check:
        """The misprinted row: its formula can only be evaluated on a square weight, and is wrong there too."""
        # For a square weight only; the shapes of any other weight do not fit.
        printed = self.dy @ self.U @ self.W_rotated.T @ self.V.T
        right = (general.dy @ general.V) @ general.W_rotated @ general.U.T
        return Check(
            "Grad Input",
            "dL/dX = dL/dY W [printed: dL/dY W^T]",
            "dL/dY U^T ~W^T V",
            "dL/dX = (dL/dY V) W~ U^T",
            _residual(printed, self.dx),
            _worst((right, general.dx), (general.dx_layer, general.dx)),
        )


def _residual(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _worst(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest residual of several (found, expected)."""
    return max(_residual(found, expected) for found, expected in pairs)


def table(context: Context) -> Table:
    """All rows with their residuals."""
    rows = [
        {
            "row": one.row,
            "Linear": one.linear,
            "SparseGrad, as printed": one.paper,
            "in our notation": one.ours,
            "residual as printed": _format_residual(one.printed),
            "residual in our notation": _format_residual(one.right),
        }
        for one in checks()
    ]
    notes = [
        f"Relative residuals in float64 with random matrices and a weight ({_OUT_FEATURES}, {_SIZE}), compared with "
        "nn.Linear and SparseGradLinear. Input and Grad Output are identities of orthogonal matrices.",
        "The paper's U and V are the transposes of ours. Its Grad Input row is a misprint: the shapes fit only a "
        "square weight, so the printed formula was evaluated on one.",
    ]
    return Table("table2", "Table 2: Linear and SparseGrad", pd.DataFrame(rows), notes)


def _format_residual(residual: float | None) -> str:
    """The residual as text; rounding errors, which differ by machine, all look the same."""
    return "" if residual is None else f"< {TINY:g}" if residual < TINY else f"{residual:.1f}: wrong"
