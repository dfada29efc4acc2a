"""Engine `merged`: SparseGrad as one optimizer over ordinary linears (paper, section 3.2).

The bases are orthogonal, so training the rotated weight W~ = V^T W U is the same as rotating the gradient, keeping
its largest entries, running Adam on them in the rotated space, and rotating the sparse update back into W. The model
stays as it is: whatever works with a `torch.optim.Optimizer` works with this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError, check_number
from sparsegrad.selection import count_kept, top_k_index


class SparseGradAdamW(torch.optim.AdamW):
    """AdamW in which the groups that carry `keep` or `density` are SparseGrad, all others plain AdamW.

    A SparseGrad group holds weights (out, in) of one layer kind. Each step, per weight: rotate the gradient by the
    group's `basis` (none: no rotation), keep its `keep` largest entries, or `density` of all; update moments and
    weight at these entries alone, with one global step count, as `torch.optim.SparseAdam` does (it adds `eps` before
    the bias correction of the second moment; `AdamW` after it); rotate the update back. A gradient that is sparse
    already (engine `layer`) is used as it is. Weight decay is decoupled and acts on the whole weight, which is the
    same in both spaces.

    Args:
        params: parameters or groups; a group may hold `basis: Basis`, and `keep: int` or `density: float`.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; note the paper's weight decay 0.
        fused, foreach: how the plain groups are updated.

    Raises:
        UserError: for a value out of range, a weight that is no matrix, does not fit its basis, or is below `keep`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        _check_hyperparameters(lr, betas, eps, weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused, foreach=foreach)
        # A fused AdamW would unscale fp16 gradients itself; the SparseGrad groups need GradScaler to do it.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and check it; see the class."""
        group = {"basis": None, "keep": None, "density": None, **param_group}
        super().add_param_group(group)
        if _is_sparse(group):
            _check_group(group)
        elif group["basis"] is not None:
            raise UserError("a group with a basis needs keep or density: give one of them, e.g. density=0.01")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` as for every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in filter(_is_sparse, groups):
            for weight in group["params"]:
                if weight.grad is not None:
                    _update(weight, self.state[weight], group)
        try:  # AdamW's own step, for the groups that are its own
            self.param_groups = [group for group in groups if not _is_sparse(group)]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the bases as plain tensors: it loads with `torch.load(weights_only=True)`."""
        state = super().state_dict()
        state["param_groups"] = [{**group, "basis": _pack(group["basis"])} for group in state["param_groups"]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and hyperparameters; the moments keep the precision they were saved in.

        Raises:
            UserError: when a saved basis does not fit the group's weights.
        """
        groups = [{**group, "basis": _unpack(group.get("basis"))} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if _is_sparse(group):
                _check_group(group)
                for weight, index in zip(group["params"], saved["params"], strict=True):
                    _restore(self.state[weight], state_dict["state"].get(index, {}), weight.device)


def _is_sparse(group: dict[str, Any]) -> bool:
    return group.get("keep") is not None or group.get("density") is not None


def _check_hyperparameters(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    check_number("lr", lr, above=0)
    check_number("eps", eps, at_least=0)
    check_number("weight_decay", weight_decay, at_least=0)
    for beta in betas:
        check_number("betas", beta, at_least=0, below=1)


def _check_group(group: dict[str, Any]) -> None:
    """Every weight is a matrix, fits the basis and holds the kept entries; the basis moves to the weights."""
    for weight in group["params"]:
        if weight.dim() != 2:
            raise UserError(f"a parameter {tuple(weight.shape)} cannot be SparseGrad: put only weights (out, in) there")
        count_kept(weight.shape, keep=group["keep"], density=group["density"])
        basis = group["basis"]
        if basis is not None and basis.shape != tuple(weight.shape):
            raise UserError(f"a basis for {basis.shape} does not fit a weight {tuple(weight.shape)}: calibrate it anew")


def _update(weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """SparseGrad on one weight (out, in), in place."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if group["basis"] is not None:  # models move after the optimizer is made; a no-op but for the first step
        group["basis"] = group["basis"].to(weight.device, dtype)
    index, values = _kept_entries(weight.grad, group, dtype)  # type: ignore[arg-type]
    change = _masked_adam(state, index, values, weight.shape, group)
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])
    if group["basis"] is None:
        weight.view(-1).index_add_(0, index, change.to(weight.dtype))
    else:
        weight.add_(group["basis"].unrotate_sparse(index, change).to(weight.dtype))


def _kept_entries(grad: Tensor, group: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat positions and values (keep,) of the kept entries of the rotated gradient."""
    if grad.is_sparse:
        grad = grad.coalesce()
        rows, columns = grad.indices()
        return rows * grad.shape[1] + columns, grad.values().to(dtype)
    rotated = grad.to(dtype) if group["basis"] is None else group["basis"].rotate(grad.to(dtype))
    index = top_k_index(rotated, count_kept(rotated.shape, keep=group["keep"], density=group["density"]))
    return index, rotated.flatten()[index]


def _masked_adam(
    state: dict[str, Any], index: Tensor, values: Tensor, shape: torch.Size, group: dict[str, Any]
) -> Tensor:
    """Adam with SparseAdam's semantics: the change (keep,) of the entries at `index`, moments kept in `state`."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros(shape, dtype=values.dtype, device=values.device)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    state["step"] += 1
    (beta1, beta2), step = group["betas"], int(state["step"])
    first, second = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    m = first[index].lerp_(values, 1 - beta1)
    v = second[index].lerp_(values * values, 1 - beta2)
    first[index], second[index] = m, v
    scale = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return m.div_(v.sqrt().add_(group["eps"])).mul_(-scale)  # type: ignore[no-any-return]


def _pack(basis: Basis | None) -> dict[str, Tensor] | None:
    return None if basis is None else {"in_basis": basis.in_basis, "out_basis": basis.out_basis}


def _unpack(packed: dict[str, Tensor] | Basis | None) -> Basis | None:
    return Basis(**packed) if isinstance(packed, dict) else packed


def _restore(state: dict[str, Any], saved: dict[str, Any], device: torch.device) -> None:
    """Undo torch's cast of loaded moments to the weight's dtype, which would round those of bf16 weights."""
    for name in ("exp_avg", "exp_avg_sq"):
        if name in saved:
            state[name] = saved[name].to(device, copy=True)
