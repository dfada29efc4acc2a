"""Engine `exact`: SparseGrad as an optimizer over ordinary linears (paper, section 3.2).

The bases are orthogonal. So training the rotated weight W~ = V^T W U is the same as rotating the gradient, keeping its
largest entries, running Adam on them in the rotated space, and rotating the sparse update back into W. The model keeps
its function and its parameters, and whatever works with a `torch.optim.Optimizer` works with this one. The weights of a
layer kind share their basis, so they are rotated, selected from and updated together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError, warn_renamed
from sparsegrad.optim.finite import all_finite
from sparsegrad.optim.group_checks import (
    check_dtype,
    check_group,
    check_hyperparameters,
    check_step,
    is_sparse,
)
from sparsegrad.optim.groups import with_names
from sparsegrad.optim.moments import stack_states
from sparsegrad.optim.release import Release
from sparsegrad.optim.saved_states import check_saved, keep_layers, pack_group, unpack_group
from sparsegrad.optim.scratch import Scratch
from sparsegrad.optim.selection import Selection, select, together
from sparsegrad.optim.torch_step import keep_out_of_compiler, unwrap_step
from sparsegrad.optim.updates import apply
from sparsegrad.optim.watch import Watch
from sparsegrad.precision import without_autocast


class SparseGradAdamW(torch.optim.AdamW):
    """AdamW in which groups with `keep` or `density` are trained by SparseGrad, and all others by plain AdamW.

    A SparseGrad group holds weights (out, in) of one layer kind. Each step does the following for each weight:
    rotate the gradient by the group's `basis` (None: no rotation), keep its `keep` largest entries or the share
    `density`, update the moments and the rotated weight at these entries only, and rotate the update back. A gradient
    that is already sparse (engine `layer`) is used as it is. Weight decay is decoupled and acts on the whole weight,
    where rotation makes no difference; with fixed positions in the state it acts on these entries alone. Weights in
    bfloat16 are rounded stochastically, so that small updates add up.

    A step in which any kept entry, or any gradient of a plain group, is not finite changes neither weights nor moments
    nor step counts of any group. It is counted in `skipped_steps`; 10 to 20 of them in a row, and 100, give a warning.
    On a GPU this is decided without waiting for it, if `fused=True` or there are no plain groups; otherwise the CPU
    waits once per step, before the plain groups. The first step in which weights that `prepare` found are frozen
    warns, too.

    Args:
        params: parameters or groups. A group may hold `basis: Basis`, `keep: int` or `density: float`, and `moments`:
            `dense` (the method) or `support` (compact, not exact; see `sparsegrad.optim.moments`); and `rotation`, from
            `rotate_gradients`, if the layers compute rotated gradients. `maximize` means the same as in torch.
            `amsgrad`, `capturable` and `differentiable` are for plain groups.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`, but with the paper's default weight decay of 0. `lr`
            may be 0, for a schedule that sets it, or a scalar tensor.
        fused, foreach: implementation of AdamW for the plain groups.

    Raises:
        UserError: for a value out of range, or a weight that is not a matrix, does not fit its basis, or has fewer than
            `keep` entries.
    """

    # Defaults on the class, because torch restores a copied or unpickled optimizer without these attributes.
    _skipped: Tensor | int = 0
    _finite: Tensor | None = None  # whether all gradients of the current step so far are finite
    _scratch: Scratch | None = None  # buffers of the current step
    _release: Release | None = None  # of `release_gradients`
    _watch: Watch | None = None  # of the steps so far
    model_size: int | None = None  # parameters of the model as it was given to `prepare`, frozen ones included
    model: weakref.ref[nn.Module] | None = None  # that `prepare` was given, for `describe`

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fused: bool | None = None,
        foreach: bool | None = None,
    ) -> None:
        check_hyperparameters(lr, betas, eps, weight_decay)
        keep_out_of_compiler(SparseGradAdamW, "_update_all", "_update_released")
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused, foreach=foreach)
        # With fused=True GradScaler would leave unscaling to the optimizer; SparseGrad groups need unscaled gradients.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, such as layers that are unfrozen later; see the class for its keys.

        Its parameters may come without names, whether those of the other groups have names or not.

        Raises:
            UserError: for a weight or a value that is not allowed; the group is not added.
        """
        group = {"basis": None, "keep": None, "density": None, "moments": "dense", "rotation": None, **param_group}
        super().add_param_group(with_names(group, self.param_groups))  # first: it makes parameters of any form a list
        group = self.param_groups[-1]
        try:
            check_hyperparameters(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
            if is_sparse(group):
                check_group(group)
            elif group["basis"] is not None:
                raise UserError("a group with a basis needs keep or density: give one of them, e.g. density=0.01")
        except BaseException:
            self.param_groups.pop()
            raise

    @property
    def skipped_steps(self) -> int:
        """Number of steps that changed nothing because a gradient was not finite; a kept entry of a SparseGrad one."""
        return int(self._skipped)

    @property
    def refused_steps(self) -> int:
        """The earlier name of `skipped_steps`."""
        warn_renamed("refused_steps", "skipped_steps")
        return self.skipped_steps

    @property
    def bases(self) -> dict[str, Basis]:
        """Layer kind -> basis of the groups that `prepare` made, for `save_bases` and a later `prepare(bases=...)`.

        Raises:
            UserError: after `prepare(engine="fast")`, whose layers store only the leading columns.
        """
        if any(group.get("weight_shape") for group in self.param_groups):
            raise UserError('engine="fast" keeps no whole bases: call calibrate first, and give prepare its bases=')
        return {group["kind"]: group["basis"] for group in self.param_groups if group.get("kind") and group["basis"]}

    def release_gradients(self) -> None:
        """From now on, update each SparseGrad weight during back-propagation and free its gradient immediately.

        The gradients of the MLP weights then never exist at the same time. Each backward pass must be one step:
        gradient accumulation, clipping and averaging over processes need all gradients together.

        `torch.amp.GradScaler` is not supported either: the weights would move by scaled gradients, before the scaler
        unscales them or skips the step. This cannot be detected here; train in float32 or bfloat16, which need no
        scaler. If a gradient is not finite, the weights whose gradients were computed before it have already moved.
        `stop_releasing` ends it: a calibration needs backward passes that move nothing.

        Raises:
            UserError: with several processes. Later, from a second backward pass before `step`, which also happens
                after a step that a GradScaler skipped.
        """
        if self._release is not None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError("gradients of several processes are averaged after back-propagation: do not release them")
        weights = [weight for group in filter(is_sparse, self.param_groups) for weight in group["params"]]
        self._release = Release(self, weights)

    def stop_releasing(self) -> None:
        """From now on, leave gradients in the weights until `step` again, as before `release_gradients`."""
        if self._release is not None:
            self._release.remove()
            self._release = None

    @without_autocast
    @torch.no_grad()
    def _update_released(self, weight: Tensor) -> None:
        """Update `weight`, whose gradient is complete, and free the gradient."""
        assert self._release is not None
        if weight in self._release.updated:
            raise UserError(
                "a second backward pass before step(): with released gradients each pass is a step of its own; "
                "do not accumulate, or do not release; nor with a GradScaler, which skips steps and moves released "
                "weights by scaled gradients: train in bfloat16 without one"
            )
        self._release.updated.add(weight)
        # Looked up anew, because loading a state replaces the groups.
        group = next(one for one in self.param_groups if is_sparse(one) and any(weight is p for p in one["params"]))
        check_dtype(weight, self.state.get(weight, {}), "a SparseGrad weight")
        self._update([select(group, [weight], self.state, self._buffers())])
        weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` as in every torch optimizer.

        Raises:
            UserError: for a rotated gradient that was clipped by value, a sharded weight, layers whose gradients
                another optimizer rotates, a sparse gradient in a plain group, a parameter whose dtype changed after the
                first step, a group with an option that SparseGrad lacks, or cores (engine `fast`) none of which has had
                a gradient in 20 steps in which other parameters had one; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all()
        return loss

    @without_autocast
    def _update_all(self) -> None:
        sparse = [group for group in self.param_groups if is_sparse(group)]
        for group in self.param_groups:
            check_step(group, self.state)
        if self._watch is None:
            self._watch = Watch()
        self._watch.check(self.param_groups, self.state)
        # Select everything first: a value that is not finite anywhere must stop the update of every weight.
        batches = [(group, weights) for group in sparse for weights in together(group["params"])]
        selections = [select(group, weights, self.state, self._buffers()) for group, weights in batches]
        self._require(all_finite(self._plain_gradients()))
        self._update(selections)
        self._step_plain()
        if self._finite is not None:
            self._skipped = self._skipped + (~self._finite).int()
        self._watch.count(self._skipped, self.param_groups)
        self._finite = self._scratch = None
        if self._release is not None:
            self._release.updated.clear()

    def _update(self, selections: list[Selection]) -> None:
        """Move the selected weights if all gradients of this step are finite.

        The decision stays a tensor on the device: reading it on the host would make the CPU wait for the GPU.
        """
        for selection in selections:
            self._require(selection.values.isfinite().all())
        for selection in selections:
            states = [self.state[weight] for weight in selection.weights]
            apply(selection, states, self._finite.to(selection.values.device), self._buffers())  # type: ignore[union-attr]

    def _require(self, finite: Tensor | None) -> None:
        """Let the current step change nothing unless `finite`, too."""
        if finite is not None:
            self._finite = finite if self._finite is None else self._finite & finite.to(self._finite.device)

    def _plain_gradients(self) -> list[Tensor]:
        plain = [group for group in self.param_groups if not is_sparse(group)]
        found = (weight.grad for group in plain for weight in group["params"])
        return [gradient for gradient in found if gradient is not None]

    def _buffers(self) -> Scratch:
        """The buffers of this step, made when the first weight needs them."""
        if self._scratch is None:
            self._scratch = Scratch()
        return self._scratch

    def _step_plain(self) -> None:
        """AdamW's own step for the plain groups, skipped if a gradient was not finite.

        A fused step is skipped on the device, through `found_inf`. Otherwise the host has to read the flag.
        """
        groups, finite, step = self.param_groups, self._finite, unwrap_step(torch.optim.AdamW.step)
        # AdamW's step processes all of `param_groups`: hide the SparseGrad groups for the duration of the call.
        self.param_groups = [group for group in groups if not is_sparse(group)]
        try:
            if finite is None or all(group["fused"] for group in self.param_groups):
                self.found_inf = None if finite is None else (~finite).float()
                step(self)
                # A fused step does not increment the version counters, by which a `BlockLinear` sees its core move.
                fused = [group for group in self.param_groups if group["fused"]]
                moved = [weight for group in fused for weight in group["params"] if weight.grad is not None]
                torch.autograd.graph.increment_version(moved)
            elif bool(finite):
                step(self)
        finally:
            self.found_inf, self.param_groups = None, groups

    def state_dict(self) -> dict[str, Any]:
        """The usual state dict, with bases as plain tensors, so that `torch.load(weights_only=True)` accepts it."""
        state = super().state_dict()
        return {**state, "param_groups": [pack_group(group) for group in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and hyperparameters. The moments keep the precision in which they were saved.

        Raises:
            UserError: when a saved basis does not fit the group's weights, or the state was saved with other moments,
                another engine, other weights or another order of them, cores between other bases, or by another
                optimizer; nothing is changed.
        """
        if not {"param_groups", "state"} <= state_dict.keys():
            raise UserError("this is no state of an optimizer: give what optimizer.state_dict() returned")
        check_saved(self.param_groups, state_dict["param_groups"])
        before = self.param_groups
        groups = [unpack_group(group) for group in state_dict["param_groups"]]
        for own, group in zip(self.param_groups, groups, strict=False):  # torch refuses another number of groups
            if is_sparse(group):
                check_group({**own, **group, "params": own["params"]})
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, saved, own in zip(self.param_groups, groups, before, strict=True):
            keep_layers(group, own)
            if not is_sparse(group):
                continue
            # torch has cast the state to the weight's dtype, which rounds moments and corrupts positions: undo that.
            for weight, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    self.state[weight][name] = value.to(weight.device, copy=True)
            stack_states([self.state[weight] for weight in group["params"] if weight in self.state])
