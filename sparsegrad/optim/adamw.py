"""Engine `exact`: SparseGrad as one optimizer over ordinary linears (paper, section 3.2).

The bases are orthogonal, so training the rotated weight W~ = V^T W U is the same as rotating the gradient, keeping
its largest entries, running Adam on them in the rotated space, and rotating the sparse update back into W. The model
stays as it is: whatever works with a `torch.optim.Optimizer` works with this. The weights of a layer kind share their
bases, so they are rotated, selected from, and updated together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.distributed import is_shard, shards_error
from sparsegrad.errors import UserError, check_choice, check_number, warn_renamed
from sparsegrad.optim.moments import MOMENTS
from sparsegrad.optim.rounding import add_stochastic, decay_
from sparsegrad.optim.selection import Selection, count_kept, select, together
from sparsegrad.targets import check_updated


class SparseGradAdamW(torch.optim.AdamW):
    """AdamW in which the groups that carry `keep` or `density` are SparseGrad, all others plain AdamW.

    A SparseGrad group holds weights (out, in) of one layer kind. Each step, per weight: rotate the gradient by the
    group's `basis` (none: no rotation), keep its `keep` largest entries, or `density` of all; update moments and
    weight at these entries alone; rotate the update back. A gradient that is sparse already (engine `layer`) is used
    as it is. Weight decay is decoupled and acts on the whole weight, which is the same in both spaces. Weights in
    bfloat16 are rounded stochastically, so that small updates add up.

    A step in which a kept entry is not finite changes nothing, neither weights nor moments nor step counts, and is
    counted in `skipped_steps`.

    Args:
        params: parameters or groups; a group may hold `basis: Basis`, `keep: int` or `density: float`, and `moments`:
            `dense` (the method's), or `support` (compact, not exact; see `sparsegrad.optim.moments`).
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`; note the paper's weight decay 0.
        fused, foreach: how the plain groups are updated.

    Raises:
        UserError: for a value out of range, a weight that is no matrix, does not fit its basis, or is below `keep`.
    """

    # On the class: torch copies an optimizer without its other attributes.
    _skipped: Tensor | int = 0
    _finite: Tensor | None = None  # of the weights that were updated before `step`
    _released: set[Tensor] | None = None
    model_size: int | None = None  # parameters of the whole model, frozen ones too; `prepare` sets it

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
        group = {"basis": None, "keep": None, "density": None, "moments": "dense", **param_group}
        super().add_param_group(group)
        if _is_sparse(group):
            _check_group(group)
        elif group["basis"] is not None:
            raise UserError("a group with a basis needs keep or density: give one of them, e.g. density=0.01")

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a kept entry of a gradient was not finite."""
        return int(self._skipped)

    @property
    def refused_steps(self) -> int:
        """The earlier name of `skipped_steps`."""
        warn_renamed("refused_steps", "skipped_steps")
        return self.skipped_steps

    @property
    def bases(self) -> dict[str, Basis]:
        """Layer kind -> basis, of the groups that `prepare` made: for `save_bases`, and `prepare(bases=...)` later.

        Raises:
            UserError: after `prepare(engine="fast")`, whose layers need only a part of them.
        """
        if any(group.get("weight_shape") for group in self.param_groups):
            raise UserError('engine="fast" keeps no whole bases: call calibrate first, and give prepare its bases=')
        return {group["kind"]: group["basis"] for group in self.param_groups if group.get("kind") and group["basis"]}

    def release_gradients(self) -> None:
        """From now on, update a SparseGrad weight as soon as back-propagation has its gradient, and free that.

        The gradients of the MLP weights then never exist together. One backward pass must be one step: accumulation,
        clipping and gradients averaged over processes need them all. So does `torch.amp.GradScaler`, with which float16
        trains: the weights would move by scaled gradients, before it unscales them or decides to skip the step. That
        cannot be seen here; train in float32 or bfloat16, which need no scaler. Where a gradient is not finite, the
        weights whose gradients came before it have moved already.

        Raises:
            UserError: with several processes; later, in a second backward pass before `step`, as after a step that a
                GradScaler skipped.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError("gradients of several processes are averaged after back-propagation: do not release them")
        self._released = set()
        for group in filter(_is_sparse, self.param_groups):
            for weight in group["params"]:
                weight.register_post_accumulate_grad_hook(self._releaser(group))

    def _releaser(self, group: dict[str, Any]) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(weight: Tensor) -> None:
            assert self._released is not None
            if weight in self._released:
                raise UserError(
                    "a second backward pass before step(): with released gradients each pass is a step of its own; "
                    "do not accumulate, or do not release; nor with a GradScaler, which skips steps and moves released "
                    "weights by scaled gradients: train in bfloat16 without one"
                )
            self._released.add(weight)
            self._update([select(group, [weight])])
            weight.grad = None

        return hook

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` as for every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sparse = [group for group in self.param_groups if _is_sparse(group)]
        self._update([select(group, weights) for group in sparse for weights in together(group["params"])])
        self._step_plain()
        if self._finite is not None:
            self._skipped = self._skipped + (~self._finite).int()
        self._finite = None
        if self._released is not None:
            self._released.clear()
        return loss

    def _update(self, selections: list[Selection]) -> None:
        """Move the selected weights, if all their kept entries are finite. Decided on the device: no wait for it."""
        for selection in selections:
            finite = selection.values.isfinite().all()
            self._finite = finite if self._finite is None else self._finite & finite.to(self._finite.device)
        for selection in selections:
            states = [self.state[weight] for weight in selection.weights]
            _apply(selection, states, self._finite.to(selection.values.device))  # type: ignore[union-attr]

    def _step_plain(self) -> None:
        """AdamW's own step, for the groups that are its own; fused, it too is told on the device to change nothing."""
        groups, finite, step = self.param_groups, self._finite, _unhooked(torch.optim.AdamW.step)
        self.param_groups = [group for group in groups if not _is_sparse(group)]
        try:
            if finite is None or all(group["fused"] for group in self.param_groups):
                self.found_inf = None if finite is None else (~finite).float()
                step(self)
                # Fused, it writes without counting its writes, by which a `BlockLinear` knows that its core has moved.
                fused = [group for group in self.param_groups if group["fused"]]
                torch.autograd.graph.increment_version([weight for group in fused for weight in group["params"]])
            elif bool(finite):
                step(self)
        finally:
            self.found_inf, self.param_groups = None, groups

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the bases as plain tensors: it loads with `torch.load(weights_only=True)`."""
        state = super().state_dict()
        state["param_groups"] = [{**group, "basis": _pack(group["basis"])} for group in state["param_groups"]]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and hyperparameters; the moments keep the precision they were saved in.

        Raises:
            UserError: when a saved basis does not fit the group's weights, or its moments or engine are others.
        """
        _check_saved(self.param_groups, state_dict["param_groups"])
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
    """Every weight is a matrix, fits the basis and holds the kept entries."""
    check_choice("moments", group["moments"], tuple(MOMENTS))
    for weight in group["params"]:
        if is_shard(weight):
            raise shards_error(f"a parameter {tuple(weight.shape)} is")
        if weight.dim() != 2:
            raise UserError(f"a parameter {tuple(weight.shape)} cannot be SparseGrad: put only weights (out, in) there")
        check_updated(weight, "a SparseGrad weight")
        count_kept(weight.shape, keep=group["keep"], density=group["density"])
        basis = group["basis"]
        if basis is not None and not basis.fits(weight.shape):
            raise UserError(f"a basis for {basis.shape} does not fit a weight {tuple(weight.shape)}: calibrate it anew")


def _check_saved(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    for mine, theirs in zip(groups, saved, strict=False):  # torch itself refuses another number of groups
        if (engine := _engine(theirs)) != _engine(mine):
            raise UserError(
                f"the saved state is of engine={engine}, this optimizer of engine={_engine(mine)}: "
                f"make it with engine={engine}, or begin without that state"
            )
        if (kind := theirs.get("moments", "dense")) != mine["moments"]:
            raise UserError(
                f"the saved state has moments={kind}, this optimizer moments={mine['moments']}: "
                f"make it with moments={kind}, or begin without that state"
            )


def _engine(group: dict[str, Any]) -> str:
    return "fast" if group.get("weight_shape") else "exact"


def _apply(selection: Selection, states: list[dict[str, Any]], finite: Tensor) -> None:
    """Move the weights of one selection in place; by nothing unless `finite`."""
    group, weights = selection.group, selection.weights
    shape = weights[0].shape
    change = MOMENTS[group["moments"]](states, selection.index, selection.values, shape.numel(), group, finite)
    if group["basis"] is None:
        change = torch.zeros(len(weights), shape.numel(), dtype=change.dtype, device=change.device).scatter_(
            1, selection.index, change
        )
    else:
        change = group["basis"].unrotate_sparse(selection.index, change, shape)
    change = change.view(len(weights), *shape)
    if group["weight_decay"]:
        decay_(weights, change, group["lr"] * group["weight_decay"] * finite)
    for weight, own, values in zip(weights, change, selection.values, strict=True):
        add_stochastic(weight, own, values)


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step inside: once an AdamW was made, torch wraps its class's, which would call the hooks again."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def _pack(basis: Basis | None) -> dict[str, Tensor | None] | None:
    return None if basis is None else {"in_basis": basis.in_basis, "out_basis": basis.out_basis}


def _unpack(packed: dict[str, Tensor] | Basis | None) -> Basis | None:
    return Basis(**packed) if isinstance(packed, dict) else packed


def _restore(state: dict[str, Any], saved: dict[str, Any], device: torch.device) -> None:
    """Undo torch's cast of loaded state to the weight's dtype, which rounds moments and breaks positions."""
    for name in saved:
        state[name] = saved[name].to(device, copy=True)
