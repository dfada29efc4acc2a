"""A check of one weight's gradient: a rotated part must not be added to one that the weight's layer did not compute."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsegrad.errors import UserError

if TYPE_CHECKING:
    from sparsegrad.layers.lean import LeanLinear


class _Sum:
    """The gradient of a weight that its layer has computed so far in one backward pass.

    `gradient` is an alias of the tensor that autograd was given: while it exists, autograd adds other gradients into a
    new tensor instead of this one. It is None after the pass, and when calls of the layer in several streams leave the
    sum to autograd, so that nothing is known of it.
    """

    def __init__(self, gradient: Tensor, stream: torch.cuda.Stream | None) -> None:
        self.gradient: Tensor | None = gradient.detach()
        self.stream = stream

    def is_all_of(self, gradient: Tensor) -> bool:
        """Whether `gradient` has no other part, as far as is known."""
        return self.gradient is None or self.gradient.data_ptr() == gradient.data_ptr()

    def release(self) -> None:
        """Let go of the gradient; the backward pass calls this when it ends."""
        self.gradient = None

    def wait(self) -> None:
        """Let the current stream wait for the sum: autograd waits for its first part only."""
        if self.stream is not None and (current := torch.cuda.current_stream(self.stream.device)) != self.stream:
            current.wait_stream(self.stream)


class Guard:
    """A hook on the weight of `layer`, which has to pass its gradients to `add`.

    The hook keeps neither the layer nor the weight alive.
    """

    def __init__(self, layer: LeanLinear) -> None:
        self._layer, self._weight = weakref.ref(layer), weakref.ref(layer.weight)
        # By the number of the backward pass, which alone owns a sum: nothing is left of a pass that fails. Reentrant
        # checkpointing starts a pass within another one.
        self._sums: weakref.WeakValueDictionary[int, _Sum] = weakref.WeakValueDictionary()
        self._handle = layer.weight.register_hook(self._check)  # type: ignore[no-untyped-call]

    def watches(self, weight: Tensor) -> bool:
        """Whether the hook is on this very tensor."""
        return self._weight() is weight

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def add(self, gradient: Tensor) -> Tensor | None:
        """Add a gradient (out, in) that the layer computed in this backward pass.

        Returns:
            What to give to autograd. It is None for later calls of the layer in one backward pass, whose gradients are
            added to the first in place, as autograd would add them, but with no tensor for the sum.
        """
        task = torch._C._current_graph_task_id()
        stream = torch.cuda.current_stream(gradient.device) if gradient.is_cuda else None
        earlier = self._sums.get(task)
        if earlier is None:
            self._sums[task] = now = _Sum(gradient, stream)
            # Where a pass does not ask for the weight's gradient, as `autograd.grad` for an input, no hook runs.
            torch.autograd.Variable._execution_engine.queue_callback(now.release)
            return gradient
        if earlier.gradient is None or earlier.stream != stream:
            earlier.wait()
            earlier.release()
            return gradient
        earlier.gradient.add_(gradient)
        return None

    def _check(self, gradient: Tensor) -> None:
        """Raise `UserError` if `gradient` (out, in) has a part that the layer did not compute.

        Such a part is not rotated, so the sum would be meaningless. Compiled layers add nothing here; then there is
        nothing to check.
        """
        own, layer = self._sums.pop(torch._C._current_graph_task_id(), None), self._layer()
        if own is not None:
            own.wait()
        if layer is None or layer.rotation is None or layer.is_traced:
            return
        if own is None or not own.is_all_of(gradient):
            raise UserError(
                f"{layer.describe_weight()} has a gradient that its linear did not compute, such as of a "
                "penalty on the weight in the loss, or changed by a hook; it cannot be added to a rotated one: use "
                "weight_decay=, or give rotation_order='gradient'"
            )
        own.release()  # so that autograd need not copy it
