"""How the weights of one layer kind get their rotated gradients; shared by its layers and its parameter group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError, check_choice
from sparsegrad.optim.later import Later
from sparsegrad.optim.orders import FIXED_ORDERS, ORDERS, Order, cheapest_order
from sparsegrad.precision import has_bfloat16_products

DTYPES = (None, torch.bfloat16)  # of `Rotation`
_TIES = 8  # equal largest entries by which clipping by value is recognized; 8 are possible by chance only in bfloat16


class Rotation:
    """A basis, and who rotates by it: the layers during back-propagation, or the optimizer in its step.

    Layers can choose the order of the products, because they have the tokens. They leave the rotated gradient in
    `weight.grad`. Rotation is linear and orthogonal, so accumulation, averaging over processes, unscaling and the norm
    of clipping mean the same there. What is not linear or reads single entries, such as clipping by value, does not.

    Attributes:
        basis: of one side or both. The optimizer replaces it when a state is loaded.
        order: `auto` (cheapest), or one of `FIXED_ORDERS`.
        dtype: dtype of the rotations of the gradient: None, that of the weights but at least float32; or
            `torch.bfloat16`, with sums in float32. The update is rotated back in the former in any case.
        in_layers: whether the layers rotate. If not, the optimizer rotates plain gradients.
        replaced: whether the layers now rotate for another optimizer.
    """

    def __init__(self, basis: Basis, order: str = "auto", dtype: torch.dtype | None = None) -> None:
        self.basis = basis
        self.order = check_choice("rotation_order", order, ORDERS)
        self.dtype = check_choice("rotation_dtype", dtype, DTYPES, "None keeps that of the weights")
        self.in_layers = self.replaced = False
        self._steps = 0
        self._ties: list[Later] = []  # counts that are not read yet
        self._settled = False  # whether `basis` has been placed where the first weights are
        # Copies for weights elsewhere: the layers of one kind may be on several devices (`device_map`).
        self._copies: dict[tuple[torch.device, torch.dtype], Basis] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without counts that a device still computes, which cannot be copied, and copies for other devices."""
        return {**vars(self), "_ties": [], "_copies": {}}

    def place(self, device: torch.device, dtype: torch.dtype) -> Basis:
        """The basis on `device` in `dtype`; only the first call for a device copies."""
        matrices = (self.basis.in_basis, self.basis.out_basis)
        if all(M is None or (M.device == device and M.dtype == dtype and M.T.is_contiguous()) for M in matrices):
            self._settled = True
            return self.basis
        if not self._settled:
            self.basis, self._settled = self.basis.to(device, dtype).by_columns(), True
            return self.basis
        return self._copy(device, dtype)

    def _copy(self, device: torch.device, dtype: torch.dtype) -> Basis:
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = self.basis.to(device, dtype).by_columns()
        return self._copies[device, dtype]

    def load(self, basis: Basis) -> None:
        """Replace the basis."""
        self.basis, self._settled = basis, False
        self._copies.clear()

    def equals(self, other: Rotation) -> bool:
        """Whether both give the same gradients."""
        pairs = [(getattr(self.basis, side), getattr(other.basis, side)) for side in ("in_basis", "out_basis")]
        return (self.order, self.dtype) == (other.order, other.dtype) and all(
            mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs.to(mine)))
            for mine, theirs in pairs
        )

    def for_gradients(self, weight: Tensor) -> Basis:
        """The basis that rotates the gradients of `weight`, in `dtype`."""
        basis = self.place(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return basis if self.dtype is None else self._copy(weight.device, self.dtype)

    def choose(self, dy: Tensor, features: int) -> Order:
        """The order for output gradients dy (tokens, out) of a linear with `features` inputs."""
        if self.order != "auto":
            return FIXED_ORDERS[self.order]
        U, V = self.basis.in_basis, self.basis.out_basis
        sides = "out" if U is None else "in" if V is None else "both"
        return cheapest_order(len(dy), features, dy.shape[1], sides)

    def check_gradients(self, index: Tensor, values: Tensor, columns: int) -> None:
        """Check the kept entries of rotated gradients.

        Clipping by value leaves many entries of exactly the bound, in many rows and columns, which a rotated gradient
        never has. Counting them costs a little, so only calls 1, 2, 4, 8, ... do. The CPU does not wait for a GPU: it
        reads a count in the first call after the GPU has come to it.

        Args:
            index: flat positions (count, k).
            values: the entries (count, k).
            columns: inputs of the weights.

        Raises:
            UserError: for gradients clipped by value, or an optimizer whose layers belong to another one.
        """
        if self.replaced:
            raise UserError(
                "the layers rotate for the optimizer of a later prepare: use that one, or give prepare "
                "rotation_order='gradient'"
            )
        self._steps += 1
        if self.in_layers and not self._steps & (self._steps - 1):
            self._ties.append(_count_ties(index, values, columns))
        while self._ties and self._ties[0].has_arrived:
            ties = int(self._ties.pop(0).number)
            if ties >= _TIES:
                raise UserError(
                    f"{ties} entries of a rotated gradient are equal, as after clipping by value, which means "
                    "something else in the rotated space: clip by norm, or give rotation_order='gradient'"
                )


def _count_ties(index: Tensor, values: Tensor, columns: int) -> Later:
    """How many of a gradient's kept entries have its largest magnitude; the most of any of some gradients.

    Ties within one column or one row do not count: with a basis of one side, neurons that are alike have them.
    """
    magnitudes = values.abs()
    largest = magnitudes.amax(1, keepdim=True)
    tied = (magnitudes == largest) & (largest > 0) & largest.isfinite()  # (count, k)
    first = index.gather(1, tied.int().argmax(1, keepdim=True))  # position of a tied entry
    rows = (tied & (index // columns != first // columns)).any(1)
    within = (tied & (index % columns != first % columns)).any(1)
    return Later((tied.sum(1) * (rows & within)).max())


def check_rotation_dtype(dtype: torch.dtype | None, device: torch.device) -> None:
    """Check that `dtype` is one of `DTYPES`, and that the device multiplies in it and sums in float32.

    Without such instructions a product in bfloat16 is emulated, and slower than one in float32.
    """
    check_choice("rotation_dtype", dtype, DTYPES, "None keeps that of the weights")
    if dtype is None:
        return
    if not has_bfloat16_products(device):
        raise UserError(
            f"rotation_dtype={dtype} needs a device with bfloat16 products, which this {device.type} lacks "
            "(AVX512-BF16 or AMX on a CPU, compute capability 8.0 on an NVIDIA GPU): leave it at None"
        )
