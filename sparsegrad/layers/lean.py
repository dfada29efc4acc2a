"""A linear with a cheaper weight gradient: rotated by the cheapest order of products, without padding, or in bfloat16.

Only dW changes; the products y = x W^T and dx = dy W do not. Engine `exact` uses it: with a rotation, `weight.grad`
holds the rotated gradient V^T dy^T x U instead of dW = dy^T x (see `sparsegrad.optim.rotation`).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.errors import UserError, check_choice
from sparsegrad.layers.common import (
    check_input,
    check_linear,
    explained_batches,
    make_linear,
    product_dtype,
    refuse_second_order,
    refuse_transforms,
)
from sparsegrad.layers.guard import Guard
from sparsegrad.layers.steps import forget, layers_of, watch
from sparsegrad.optim.orders import rotated_gradient
from sparsegrad.optim.rotation import Rotation

_REMEDY = (
    "give prepare rotation_order='gradient' (calibrate: drop_padding=False), and leave drop_padding and save_dtype off"
)
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
        if not torch.is_autocast_enabled(device) and not torch.compiler.is_compiling():
            with explained_batches(_REMEDY):
                return _LeanLinear._multiply(ctx, *grads)
        # Autograd runs this in the caller's autocast, and compiled code in that of the forward pass, which would round
        # the rotations.
        explained = nullcontext() if torch.compiler.is_compiling() else explained_batches(_REMEDY)
        with torch.autocast(device, enabled=False), explained:
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
            if U is not None or V is not None:
                dW = ctx.layer.guarded(dW)
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
            layer with a rotation always does this; compiled code never does, as its shapes cannot depend on the number.
        save_dtype: dtype in which x is saved for dW, such as `torch.bfloat16`: half the memory, but rounded products.

    Raises:
        UserError: for a dtype that is not floating, or a module that is not an `nn.Linear`, such as GPT-2's `Conv1D`.
    """

    # Defaults on the class, because `convert` does not call `__init__`.
    drop_padding: bool = False
    save_dtype: torch.dtype | None = None
    rotation: Rotation | None = None
    _name: str | None = None  # in the model
    _guard: Guard | None = None  # checks the gradients of a weight that gets rotated ones
    is_traced: bool = False  # whether compiled code computes the gradients, of which the guard learns nothing

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
        linear.__dict__.pop("is_traced", None)  # of calls before this
        linear._watch()
        return linear

    def _watch(self) -> None:
        """Check the gradients of a layer that rotates, and the optimizer that steps its weight."""
        if self.rotation is None:
            return
        watch(self)
        if self._guard is not None and not self._guard.watches(self.weight):  # as after load_state_dict(assign=True)
            self._guard.remove()
            self._guard = None
        if self._guard is None and self.weight.requires_grad:
            self._guard = Guard(self)

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
        for name in ("rotation", "_guard", "is_traced"):
            self.__dict__.pop(name, None)

    def to_linear(self) -> nn.Linear:
        """An ordinary linear that shares the parameters of this layer."""
        return make_linear(self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) to y (..., out). Under autocast the products use its dtype, as in `nn.Linear`."""
        x = input  # the parameter's name is that of `nn.Linear`
        if not torch.is_grad_enabled():
            return self._infer(x)
        refuse_transforms(_REMEDY)
        check_input(x, self.weight, self.bias, _REMEDY)
        dtype, U, V = product_dtype(x), None, None
        if self._rotates():
            assert self.rotation is not None
            basis = self.rotation.for_gradients(self.weight)
            U, V = basis.in_basis, basis.out_basis
            if torch.compiler.is_compiling():
                self.is_traced = True
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            y = _LeanLinear.apply(tokens, self.weight, bias, U, V, self)  # type: ignore[no-untyped-call]
        return y.reshape(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def _infer(self, x: Tensor) -> Tensor:
        """y without a gradient, by the product of `nn.Linear`: autocast casts its weight once, not in each call."""
        if x.is_nested:
            return nn.functional.linear(x, self.weight, self.bias)
        # Rows of tokens, as with a gradient: other products round otherwise.
        y = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _rotates(self) -> bool:
        """Whether the gradient is to be rotated: only that of the parameter itself, which the optimizer steps.

        Another tensor in its place, as `torch.func.functional_call` puts there, gets a plain gradient.
        """
        if self.rotation is None or not self.weight.requires_grad:
            return False
        self._refuse_replica()
        return self._guard is None or self._guard.watches(self.weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for every module. A new weight is the layer's own, as after `load_state_dict(assign=True)`.

        So it gets rotated gradients: whoever puts it there gives it to the optimizer.
        """
        super().register_parameter(name, param)
        if name == "weight":
            self._watch()

    def _apply(self, *args: Any, **kwargs: Any) -> LeanLinear:
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._watch()  # a conversion may have replaced the weight
        return self

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
        # On a CPU the count is at hand and always pays.
        at_hand = self.rotation is not None and dy.is_cpu
        if not (self.drop_padding or at_hand) or torch.compiler.is_compiling():  # whose shapes cannot depend on it
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
        if self.rotation is None or (U is None and V is None):
            return dy.T @ x
        return rotated_gradient(dy, x, U, V, self.rotation.choose(dy, x.shape[1]))

    def guarded(self, gradient: Tensor) -> Tensor | None:
        """What to give to autograd for a rotated gradient (out, in), of which the guard is told."""
        # In this order: the compiler knows no guard. What compiled calls of the layer add, it cannot tell apart.
        if torch.compiler.is_compiling() or self._guard is None or self.is_traced:
            return gradient
        return self._guard.add(gradient)

    def describe_weight(self) -> str:
        """The weight for a message: by its name in the model, if it is known."""
        return f"a weight {tuple(self.weight.shape)}" if self._name is None else f"{self._name}.weight"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        """Without the guard, which neither a copy nor a file can have, and what is known of compiled calls."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_guard", "is_traced")}
