"""A linear with a cheaper weight gradient: rotated by the cheapest order of products, without padding, or in bfloat16.

Only dW changes; the products y = x W^T and dx = dy W do not. Engine `exact` uses it: with a rotation, `weight.grad`
holds the rotated gradient V^T dy^T x U instead of dW = dy^T x (see `sparsegrad.optim.rotation`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError, check_choice
from sparsegrad.layers.common import check_linear, make_linear, product_dtype, refuse_second_order, refuse_transforms
from sparsegrad.layers.steps import forget, layers_of, watch
from sparsegrad.optim.orders import rotated_gradient
from sparsegrad.optim.rotation import Rotation

_REMEDY = "give prepare rotation_order='gradient', and leave drop_padding and save_dtype off"
_PROBE = 16  # leading columns of dy that tell most rows that are not zero; the others are read whole


class _LeanLinear(torch.autograd.Function):
    """y = x W^T + b with x (tokens, in) saved in `layer.save_dtype` and the gradient of W by `layer.weight_gradient`.

    U and V are None without a rotation. They are arguments, so that `torch.compile` sees them as tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, U: Tensor | None, V: Tensor | None, layer: LeanLinear
    ) -> Tensor:
        saved = x.to(layer.save_dtype or x.dtype) if ctx.needs_input_grad[1] else None
        cast = W.to(x.dtype)  # saved, as autocast does: one cast per pass serves both products
        ctx.save_for_backward(saved, cast, U, V)
        ctx.layer, ctx.weight_dtype = layer, W.dtype
        return nn.functional.linear(x, cast, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(_REMEDY)
        device = grads[0].device.type
        if not torch.is_autocast_enabled(device):
            return _LeanLinear._multiply(ctx, *grads)
        # Autograd runs this in the caller's autocast: a backward pass within it would round the rotations.
        with torch.autocast(device, enabled=False):
            return _LeanLinear._multiply(ctx, *grads)

    @staticmethod
    def _multiply(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, U, V = ctx.saved_tensors
        needs, tokens, dx, dW = ctx.needs_input_grad, len(dy), None, None
        rows, empty = ctx.layer.find_rows(dy)
        if rows is not None:  # the other rows of dy are zero, and so are their rows of dx
            dy = dy[rows]
        if needs[0]:
            dx = dy @ W
            if rows is not None:
                dx = dx.new_empty(tokens, dx.shape[1]).index_copy_(0, rows, dx).index_fill_(0, empty, 0)
        if needs[1]:
            dW = ctx.layer.weight_gradient(dy, x if rows is None else x[rows], U, V).to(ctx.weight_dtype)
            ctx.layer.note(dW)
        return dx, dW, dy.sum(0) if needs[2] else None, None, None, None


def _check_options(drop_padding: bool, save_dtype: torch.dtype | None) -> None:
    check_choice("drop_padding", drop_padding, (True, False))
    if save_dtype is not None and not save_dtype.is_floating_point:
        raise UserError(f"save_dtype={save_dtype} is not allowed: give a floating dtype, e.g. torch.bfloat16")


class LeanLinear(nn.Linear):
    """An `nn.Linear` with the same parameters and the same function whose weight gradient is cheaper.

    Args:
        linear: the linear whose weight (out, in) and bias this layer shares.
        drop_padding: leave out tokens whose output gradient is zero, as it is for padding. The sums are the same with
            fewer terms. The number of such tokens is read on the host, which makes the CPU wait for a GPU. On a CPU a
            layer with a rotation always does this.
        save_dtype: dtype in which x is saved for dW, such as `torch.bfloat16`: half the memory, but rounded products.

    Raises:
        UserError: for a dtype that is not floating, or a module that is not an `nn.Linear`, such as GPT-2's `Conv1D`.
    """

    # Defaults on the class, because `convert` does not call `__init__`.
    drop_padding: bool = False
    save_dtype: torch.dtype | None = None
    rotation: Rotation | None = None
    _name: str | None = None  # in the model
    _guard: Any = None  # handle of the hook that checks gradients
    _noted: tuple[Tensor, ...] = ()  # gradients of W that the backward pass `_noted_in` has computed so far
    _noted_in: int = -1
    _traced: bool = False  # compiled code does not note its gradients

    def __init__(
        self,
        linear: nn.Linear,
        *,
        drop_padding: bool = False,
        save_dtype: torch.dtype | None = None,
    ) -> None:
        check_linear(linear, "a lean linear", "leave drop_padding and save_dtype off")
        _check_options(drop_padding, save_dtype)
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.drop_padding, self.save_dtype = drop_padding, save_dtype

    @classmethod
    def convert(
        cls,
        linear: nn.Linear,
        *,
        rotation: Rotation | None = None,
        drop_padding: bool = False,
        save_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> LeanLinear:
        """Turn `linear` itself into a `LeanLinear`: it keeps its place in the model, its names and its hooks.

        Args:
            linear: an `nn.Linear` or a `LeanLinear`.
            rotation: leave rotated gradients in `weight.grad`; None: plain gradients.
            drop_padding, save_dtype: as for the class.
            name: of `linear` in its model, for messages.

        Raises:
            UserError: as for the class; `linear` is unchanged.
        """
        check_linear(linear, "a lean linear", "leave drop_padding and save_dtype off")
        _check_options(drop_padding, save_dtype)
        linear.__class__ = cls
        assert isinstance(linear, LeanLinear)
        linear.drop_padding, linear.save_dtype, linear._name = drop_padding, save_dtype, name
        if linear.rotation is not None and linear.rotation is not rotation:
            linear.rotation.replaced = True  # the earlier optimizer must not take these gradients for its own
        linear.rotation = rotation
        linear._watch()
        return linear

    def _watch(self) -> None:
        """Check the gradients of a layer that rotates, and the optimizer that steps its weight."""
        if self.rotation is None:
            return
        watch(self)
        if self._guard is None and self.weight.requires_grad:
            self._guard = self.weight.register_hook(self._check_gradient)  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        """Turn this layer itself back into an `nn.Linear`. The optimizer then rotates its gradients.

        All layers of its rotation leave that to the optimizer then, which treats the weights of a layer kind alike. A
        rotated gradient is deleted: the next optimizer would take it for a plain one.
        """
        if self.rotation is not None:
            self.rotation.in_layers = False
            for layer in layers_of(self.rotation):
                layer._stop_rotating()
        for name in ("drop_padding", "save_dtype", "_name"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def _stop_rotating(self) -> None:
        self.weight.grad = None
        forget(self)
        if self._guard is not None:
            self._guard.remove()
        for name in ("rotation", "_guard", "_noted", "_noted_in", "_traced"):
            self.__dict__.pop(name, None)

    def to_linear(self) -> nn.Linear:
        """An ordinary linear that shares the parameters of this layer."""
        return make_linear(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to y (..., out). Under autocast the products use its dtype, as in `nn.Linear`."""
        if not torch.is_grad_enabled():
            return self._infer(x)
        refuse_transforms(_REMEDY)
        dtype, U, V = product_dtype(x), None, None
        if self.rotation is not None and self.weight.requires_grad:
            self._refuse_replica()
            basis = self.rotation.for_gradients(self.weight)
            U, V = basis.in_basis, basis.out_basis
            self._traced = torch.compiler.is_compiling()
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            y = _LeanLinear.apply(tokens, self.weight, bias, U, V, self)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def _infer(self, x: Tensor) -> Tensor:
        """y without a gradient, by the product of `nn.Linear`: autocast casts its weight once, not in each call."""
        W: Tensor = self.weight
        bias: Tensor | None = self.bias
        if not torch.is_autocast_enabled(x.device.type):  # which remembers the casts of parameters alone
            W, bias = W.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = nn.functional.linear(x.reshape(-1, x.shape[-1]), W, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _refuse_replica(self) -> None:
        """Raise `UserError` in a copy that `nn.DataParallel` makes, whose gradients the original could not check."""
        if getattr(self, "_is_replica", False):
            raise UserError(
                "nn.DataParallel copies the model in each step, which rotated gradients do not survive: start one "
                "process per GPU with torchrun, show this process one GPU (CUDA_VISIBLE_DEVICES=0), or give prepare "
                "rotation_order='gradient'"
            )

    def find_rows(self, dy: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices of the tokens whose output gradient dy (tokens, out) is not zero, and of the others.

        (None, None) if no token is left out: indexing would only copy.
        """
        # On a CPU the count is at hand and always pays. Compiled code cannot have a shape that depends on it.
        at_hand = self.rotation is not None and dy.is_cpu and not torch.compiler.is_compiling()
        if not (self.drop_padding or at_hand):
            return None, None
        found = dy[:, :_PROBE].any(1)
        if bool(found.all()):
            return None, None
        unsure = found.logical_not().nonzero().flatten()
        found[unsure] = dy[unsure].any(1)
        empty = found.logical_not().nonzero().flatten()
        return (found.nonzero().flatten(), empty) if len(empty) else (None, None)

    def weight_gradient(self, dy: Tensor, x: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
        """dW (out, in), rotated by U and V if given, from dy (tokens, out) and the saved x (tokens, in)."""
        # In the saved dtype: casting x back would allocate the copy that saving it in bfloat16 avoids.
        dy = dy.to(x.dtype)
        if self.rotation is None:
            return dy.T @ x
        return rotated_gradient(dy, x, U, V, self.rotation.choose(dy, x.shape[1]))

    def note(self, gradient: Tensor) -> None:
        """Remember a gradient of this backward pass for `_check_gradient`."""
        if self._guard is not None and not torch.compiler.is_compiling():
            task = torch._C._current_graph_task_id()
            if task != self._noted_in:
                # Where a pass does not ask for the weight's gradient, as `autograd.grad` for an input, no hook runs.
                torch.autograd.Variable._execution_engine.queue_callback(self._forget_noted)
            earlier = self._noted if task == self._noted_in else ()
            # An alias: while it exists, autograd adds other gradients into a new tensor instead of this one. Two are
            # enough to know that there were several.
            self._noted, self._noted_in = (*earlier, gradient.detach())[:2], task

    def _forget_noted(self) -> None:
        """Let go of what a backward pass noted, when it ends."""
        self._noted, self._noted_in = (), -1

    def _check_gradient(self, gradient: Tensor) -> None:
        """Hook on the weight: raise `UserError` if `gradient` (out, in) has a part that this layer did not compute.

        Such a part is not rotated, so the sum would be meaningless. With several calls of the layer in one backward
        pass autograd has already added them up, and nothing is checked.
        """
        noted, self._noted = self._noted, ()
        if len(noted) > 1 or self._traced or self.rotation is None:
            return
        if not noted or noted[0].data_ptr() != gradient.data_ptr():
            raise UserError(
                f"{self.describe_weight()} has a gradient that its linear did not compute, such as of a "
                "penalty on the weight in the loss, or changed by a hook; it cannot be added to a rotated one: use "
                "weight_decay=, or give rotation_order='gradient'"
            )

    def describe_weight(self) -> str:
        """The weight for a message: by its name in the model, if it is known."""
        return f"a weight {tuple(self.weight.shape)}" if self._name is None else f"{self._name}.weight"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        """Without the hook, which neither a copy nor a file can have."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_guard", "_noted", "_noted_in")}
