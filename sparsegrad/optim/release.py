"""Hooks by which an optimizer updates weights during back-propagation and frees their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from sparsegrad.errors import UserError

if TYPE_CHECKING:
    from sparsegrad.optim.adamw import SparseGradAdamW


class Release:
    """The hooks of one optimizer on its weights; they stay until `remove`, or until the optimizer is gone.

    Attributes:
        updated: weights that the backward pass of this step has updated already.
    """

    def __init__(self, optimizer: SparseGradAdamW, weights: list[Tensor]) -> None:
        hook = _make_hook(optimizer)
        self.updated: set[Tensor] = set()
        self.weights = {id(weight) for weight in weights}
        self._handles = [weight.register_post_accumulate_grad_hook(hook) for weight in weights]  # type: ignore[no-untyped-call]
        _active.add(self)

    def remove(self) -> None:
        """Take the hooks off the weights."""
        _active.discard(self)
        for handle in self._handles:
            handle.remove()


_active: weakref.WeakSet[Release] = weakref.WeakSet()


def refuse_released(weights: Iterable[Tensor]) -> None:
    """Raise `UserError` for a weight that an optimizer updates in every backward pass, as one for calibration is."""
    released = {weight for release in _active for weight in release.weights}
    for weight in weights:
        if id(weight) in released:
            raise UserError(
                f"a weight {tuple(weight.shape)} moves in every backward pass, since its optimizer releases the "
                "gradients: call stop_releasing() of that optimizer first"
            )


def _make_hook(optimizer: SparseGradAdamW) -> Callable[[Tensor], None]:
    """A hook that updates a weight of `optimizer` as soon as its gradient is complete.

    It refers to the optimizer weakly: Python cannot collect a circle through a hook, and the weights and their moments
    would stay in memory for good.
    """
    owner = weakref.ref(optimizer)

    def hook(weight: Tensor) -> None:
        if (found := owner()) is not None:
            found._update_released(weight)

    return hook
