"""The layer of engine `fast`: it trains one fixed leading block of the rotated gradient, not its largest entries.

This is not the exact method; see `sparsegrad.layers.block_product`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.distributed import is_managed, is_shard, whole
from sparsegrad.errors import UserError, check_integer
from sparsegrad.layers.block_product import REMEDY, BlockProduct
from sparsegrad.layers.common import (
    FixedParameter,
    check_fit,
    check_input,
    check_linear,
    factor_change,
    keep_fixed,
    make_linear,
    product_dtype,
    refuse_transforms,
)
from sparsegrad.layers.shards import check_gathered, check_shards, count_writes, new_core, own_part
from sparsegrad.layers.steps import forget, watch
from sparsegrad.optim.rounding import add_stochastic
from sparsegrad.targets import UPDATED, check_updated


class BlockLinear(nn.Module):
    """A linear whose weight is W + V_c core U_r^T, of which only the core (c, r) trains.

    The core is an ordinary parameter, so gradient accumulation, clipping, AMP and any optimizer work as usual. Its
    change is merged into W at the end of the optimizer's step, so that a forward pass costs one product, and whoever
    reads `weight` sees the step. W itself has no gradient.

    `merged` (c, r) is the part of the core that W includes already. It never trains, but it is a parameter: the layer's
    function is linear in W, `core` and `merged` together, so averages, vectors and copies made over `parameters()` are
    those of the function. With shards it is a `DTensor`, which would train if someone unfroze it.

    Other changes of the core are merged in the next forward pass. The layer detects them by torch's version counter of
    in-place writes, which leaves out writes through `.data`. It sees those when the mode changes (`train`, `eval`).

    W may be sharded by FSDP2 (see `sparsegrad.layers.shards`). The layer then merges its own rows of V_c core U_r^T
    into its own rows of W. This must happen before FSDP2 gathers W, so `merge_shards` does it when a forward pass of
    the whole model begins.

    Args:
        weight: W (out, in); the layer keeps it and changes it in place.
        bias: (out,) or None; a parameter becomes that of the layer.
        basis: basis of both sides, of which the leading columns are used.
        core_shape: (c, r), at most (out, in).

    Raises:
        UserError: for a basis of another shape or of one side, a core larger than the weight, or a weight in float16.
    """

    merged: FixedParameter
    in_basis: Tensor
    out_basis: Tensor
    _cast: tuple[tuple[Any, ...], Tensor] | None = None  # state of W, and W in another dtype
    _merged_state: tuple[int, ...]  # of the core when it was merged; see `count_writes`
    _unsure: bool = False  # whether the core may have been written to through `.data`

    def __init__(self, weight: Tensor, bias: Tensor | None, basis: Basis, core_shape: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)  # the same object
        self._add_core(basis, core_shape)

    def _add_core(self, basis: Basis, core_shape: tuple[int, int]) -> None:
        _keep_out_of_compiler()
        weight = self.weight
        check_fit(basis, weight)
        check_updated(weight, "the weight of a block")
        for name, size, most in zip(("out", "in"), core_shape, weight.shape, strict=True):
            check_integer(f"{name} directions", size, at_least=1, at_most=most)
        # At least float32, whatever the weight's dtype, so that small changes are not lost to rounding.
        self.core = nn.Parameter(new_core(weight, core_shape))
        self.merged = FixedParameter(new_core(weight, core_shape))
        U, V = basis.to(weight.device, weight.dtype).both()
        # Not persistent: bases are the same for all blocks, and `save_bases` stores them once.
        self.register_buffer("in_basis", U[:, : core_shape[1]].contiguous(), persistent=False)
        self.register_buffer("out_basis", V[:, : core_shape[0]].contiguous(), persistent=False)
        self._merged_state = count_writes(self.core)
        watch(self)

    @classmethod
    def from_linear(cls, linear: nn.Linear, basis: Basis, core_shape: tuple[int, int]) -> BlockLinear:
        """Make a layer from copies of the weight (out, in) and bias of `linear`.

        Raises:
            UserError: as the class, and for a module that is not an `nn.Linear`, such as GPT-2's `Conv1D`.
        """
        check_linear(linear, "a block")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(linear.weight.detach().clone(), bias, basis, core_shape)

    @classmethod
    def convert(cls, linear: nn.Linear, basis: Basis, core_shape: tuple[int, int]) -> BlockLinear:
        """Turn `linear` itself into this layer: it keeps its place in the model, its names, its hooks and its weight.

        FSDP2, too, remembers modules and parameters by identity.

        Raises:
            UserError: as the class, or for shards that are not supported (see `check_shards`).

        After any error `linear` is unchanged.
        """
        if is_managed(linear) or is_shard(linear.weight):
            check_shards(linear)
        kind = type(linear)
        linear.__class__ = cls  # type: ignore[assignment]
        assert isinstance(linear, BlockLinear)
        try:
            linear._add_core(basis, core_shape)
        except BaseException:  # memory may be short
            linear.discard_core()
            linear.__class__ = kind
            raise
        linear.weight.requires_grad_(False)
        linear.weight.grad = None  # of an earlier pass: no optimizer would delete it
        return linear

    def restore(self) -> None:
        """Turn this layer itself into an `nn.Linear` with the same function: the counterpart of `convert`.

        Its weight trains again; its bias trains if it did before.

        Raises:
            UserError: as `merge`.
        """
        self.merge(force=True)
        self.discard_core()
        self.out_features, self.in_features = self.weight.shape
        self.weight.requires_grad_(True)

    def discard_core(self) -> None:
        """Turn this layer itself into an `nn.Linear` of W as it is, also if it has only a part of a core yet."""
        forget(self)
        for name in {"core", "merged", "in_basis", "out_basis"} & {*self._parameters, *self._buffers}:
            delattr(self, name)
        for name in ("_merged_state", "_unsure", "_cast"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """An ordinary linear that computes the same function. It shares weight and bias with this layer.

        Raises:
            UserError: as `merge`.
        """
        self.merge(force=True)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach())
        return make_linear(nn.Parameter(self.weight.detach()), bias)

    @torch.no_grad()
    def merge(self, force: bool = False) -> None:
        """Add to W what has changed in the core since the last merge.

        With shards all processes must call it together; each adds its own rows.

        Args:
            force: also after writes to the core that torch does not count: those through `.data`.

        Raises:
            UserError: while FSDP2 has gathered W, or if W is computed from other parameters: what is added to that copy
                would be lost; or if W has been converted to float16, in which small changes are.
        """
        # The version counts in-place writes. Comparing values instead would make the CPU wait for the GPU.
        state = count_writes(self.core)
        counted = state != self._merged_state
        if not (counted or force or self._unsure):
            return
        if reason := self._explain_loss():
            if whole(self.core).equal(whole(self.merged)):
                return
            raise UserError(reason)
        if is_managed(self) and not is_shard(self.weight):
            if whole(self.core).equal(whole(self.merged)):  # only the identity of the core has changed
                return
            raise UserError(
                "FSDP2 has gathered this weight, so that it cannot change: call fully_shard on each block of the "
                "model, and not on the whole model alone"
            )
        # A forward pass may call this under autocast, which would round the products to half precision.
        with torch.autocast(self.core.device.type, enabled=False):
            # Usually a change that is not counted is none, which must not invalidate a graph that has saved W.
            self._add_change(self.weight if counted else self.weight.data, whole(self.core - self.merged))
        self.merged.copy_(self.core)
        self._merged_state, self._unsure = state, False
        if not counted:
            self._cast = None

    def _explain_loss(self) -> str:
        """Why a change of W would be lost; empty if it would not."""
        if "weight" not in self._parameters:
            return (
                "the weight of a block is computed from other parameters, as by pruning or weight_norm, so that its "
                "core cannot be merged into it: call to_linears(model) before that, and prepare again"
            )
        if self.weight.dtype not in UPDATED:
            return (
                f"the weight of a block is {self.weight.dtype} now, in which small updates are lost: train in float32 "
                "or bfloat16, and call to_linears(model) before you convert it"
            )
        return ""

    def train(self, mode: bool = True) -> BlockLinear:
        """As for every module. The next merge then does not rely on counts: see the class on writes through `.data`."""
        if mode != self.training and not is_managed(self):  # shards would have to be exchanged
            self._unsure = True
        return super().train(mode)

    def _add_change(self, W: Tensor, change: Tensor) -> None:
        """Add this process's part of V_c change U_r^T to its part of W, for a change (c, r) of the core."""
        weight, rows, columns = own_part(W)
        # (rows, k) and (k, columns), with k the shorter side of the core
        left, right = factor_change(change, self.in_basis[columns], self.out_basis[rows])
        if weight.dtype == torch.bfloat16:
            add_stochastic(weight, left @ right, whole(self.core))
        else:
            weight.addmm_(left.to(weight.dtype), right.to(weight.dtype))

    @torch.no_grad()
    def _cast_weight(self, dtype: torch.dtype) -> Tensor:
        """W in `dtype`, cast once after each merge instead of in each forward pass, as under autocast."""
        W = self.weight
        if W.dtype == dtype:
            return W
        # Any write increments the version, except those through `.data`; a move to another device changes the address.
        state = (dtype, W._version, W.data_ptr())
        if self._cast is None or self._cast[0] != state:
            self._cast = None  # frees the old copy first
            with torch.inference_mode(False):  # else no later training step could save it for its backward pass
                self._cast = (state, W.detach().to(dtype))
        return self._cast[1]

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in) to y (..., out). Under autocast the products use its dtype, as in `nn.Linear`.

        Raises:
            RuntimeError: as `nn.Linear`, for an input of another dtype that autocast does not cast.
            UserError: for a nested tensor, unless gradients are off; with FSDP2, as `check_gathered`.
        """
        x = input  # the parameter's name is that of `nn.Linear`
        if sharded := is_managed(self):
            check_gathered(self.core, self._merged_state)
        else:
            self.merge()
        if x.is_nested and not torch.is_grad_enabled():
            return nn.functional.linear(x, self.weight, self.bias)
        check_input(x, self.weight, self.bias, REMEDY)
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            W = self.weight if sharded else self._cast_weight(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            y = self._multiply(tokens, W, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _multiply(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():  # spares the products and casts that only a gradient needs
            return nn.functional.linear(x, W.to(x.dtype), bias)
        refuse_transforms(REMEDY)
        # A projection gathers a token's norm in few entries, and float16 may not hold it.
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        U_r, V_c = self.in_basis.to(dtype), self.out_basis.to(dtype)
        return BlockProduct.apply(x, W, bias, self.core, U_r, V_c)  # type: ignore[no-untyped-call, no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> BlockLinear:
        """As for every module, but the core stays at least float32, also in `model.to(torch.bfloat16)`."""

        own = (self.core, self.core.grad, self.merged)  # as they are now: torch may replace them one by one

        def apply(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            of_core = any(tensor is one for one in own)
            is_narrow = of_core and found.dtype != tensor.dtype and torch.finfo(found.dtype).bits < 32
            return tensor.to(found.device, torch.float32) if is_narrow else found

        super()._apply(apply, *args, **kwargs)  # type: ignore[no-untyped-call]
        keep_fixed(self, "merged")
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        keep_fixed(self, "merged")

    def __getstate__(self) -> dict[str, Any]:
        """Without the cast weight, which the copy makes for itself."""
        return {name: value for name, value in vars(self).items() if name != "_cast"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if (merged := self._buffers.pop("merged", None)) is not None:  # of an earlier version
            self.merged = FixedParameter(merged)
        keep_fixed(self, "merged")
        _keep_out_of_compiler()
        watch(self)
        # A copied core has a new version counter, and the copy may have been made between a step and its merge.
        self._merged_state = ()

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, core={tuple(self.core.shape)}"


@functools.cache
def _keep_out_of_compiler() -> None:
    """Exclude from torch.compile what writes to W by a counter of versions, which the compiler does not trace.

    Not as decorators: they import the compiler, which takes longer than importing the rest of this library and torch.
    """
    for name in ("merge", "_cast_weight"):
        setattr(BlockLinear, name, torch.compiler.disable(getattr(BlockLinear, name)))  # type: ignore[no-untyped-call]
