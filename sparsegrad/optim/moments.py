"""Adam on kept entries: which moments are stored, and the update they give (paper, section 3.2).

Both functions process the kept entries of `count` weights of one shape at once. Where `finite`, a bool tensor on the
device, is False, they leave moments and step counts unchanged and return a change of zero. The step counts are tensors
on the device too, so that the CPU never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
_EMPTY = torch.iinfo(torch.int32).max  # position of an unused slot: beyond every weight, so it sorts last
_STACKED = ("exp_avg", "exp_avg_sq", "index", "age", "used")
_SLOTS = 4  # entries for which `support` stores moments, in multiples of the kept entries


def dense_moments(
    states: Sequence[State], index: Tensor, values: Tensor, size: int, group: State, finite: Tensor
) -> Tensor:
    """The method's moments: two for every entry of a weight, of which a step updates those of the kept entries.

    As in `torch.optim.SparseAdam`, all entries share one step count, and `eps` is added before the bias correction of
    the second moment (`AdamW` adds it afterwards).

    Args:
        states: per weight `step`, `exp_avg` (size,) and `exp_avg_sq` (size,); created if missing.
        index: flat positions (count, k) of the kept entries.
        values: their rotated gradients (count, k).
        size: number of entries of a weight, out * in.
        group: with `lr`, `betas` and `eps`.
        finite: bool tensor; False skips the step.

    Returns:
        The change (count, k) of the rotated weights at `index`.
    """
    first, second = (_Rows(states, name, size, values) for name in ("exp_avg", "exp_avg_sq"))
    (beta1, beta2), steps = group["betas"], _count_step(states, finite)
    m, v = _update_moments(first.gather(index), second.gather(index), values, group["betas"], finite)
    first.scatter(index, m)
    second.scatter(index, v)
    exponents = steps.double().clamp(min=1)  # 0 while every step was skipped: 1 - beta^0 would divide by zero
    scales = -group["lr"] * (1 - beta2**exponents).sqrt() / (1 - beta1**exponents) * finite
    change: Tensor = m / (v.sqrt() + group["eps"]) * scales.to(m.dtype)[:, None]  # (count, k) * (count, 1)
    return change


def support_moments(
    states: Sequence[State], index: Tensor, values: Tensor, size: int, group: State, finite: Tensor
) -> Tensor:
    """Moments only for the most recently kept entries, four times as many as a step keeps: not exact.

    An entry that has not been kept for a long time loses its moments and starts again as a new one. So each entry has
    its own age, which replaces the step count in Adam's bias correction. At a density of 1 % this uses a tenth of the
    memory of the dense moments. If `keep` or `density` of the group changes, so does the number of slots: the entries
    that were used last keep theirs.

    Args and return value as for `dense_moments`, but a state holds `step` and, per slot, `index` (sorted), `exp_avg`,
    `exp_avg_sq`, `age` (number of updates) and `used` (the step of the last update).
    """
    (beta1, beta2), steps = group["betas"], _count_step(states, finite)
    slots = min(_SLOTS * index.shape[1], size)
    rows = _load_slots(states, slots, values)  # name -> (count, slots)
    old = {name: one.read() for name, one in rows.items()}
    order = index.argsort(1)  # sorted, as the slots are, for the binary search below
    key, gradient = index.gather(1, order).int(), values.gather(1, order)
    place = torch.searchsorted(old["index"], key).clamp_(max=slots - 1)
    known = old["index"].gather(1, place) == key  # (count, k): whether the entry has a slot
    m, v, age = (old[name].gather(1, place) * known for name in ("exp_avg", "exp_avg_sq", "age"))
    m, v = _update_moments(m, v, gradient, group["betas"], finite)
    age = age + finite
    # The slots go to the entries with the largest `used`. With -1, the entries of a skipped step never get one.
    used = torch.where(finite, steps.int()[:, None].expand_as(key), -1)
    new = {"index": key, "exp_avg": m, "exp_avg_sq": v, "age": age, "used": used}
    for name, latest in _find_latest(old, new, place, known & finite).items():
        rows[name].write(latest)
    exponents = age.clamp(min=1).to(m.dtype)
    change = (m / (1 - beta1**exponents)) / ((v / (1 - beta2**exponents)).sqrt() + group["eps"]) * -group["lr"]
    return torch.zeros_like(values).scatter_(1, order, change * finite)  # back in the order of `index`


MOMENTS: dict[str, Callable[..., Tensor]] = {"dense": dense_moments, "support": support_moments}


def _update_moments(
    m: Tensor, v: Tensor, gradient: Tensor, betas: tuple[float, float], finite: Tensor
) -> tuple[Tensor, Tensor]:
    """Both moments, moved towards the gradient and its square; unchanged if the step is skipped."""
    gradient = torch.where(finite, gradient, 0)  # a weight of zero alone is not enough: 0 * NaN is NaN
    weights = [finite.to(m.dtype) * (1 - beta) for beta in betas]
    return m + (gradient - m) * weights[0], v + (gradient * gradient - v) * weights[1]


def _count_step(states: Sequence[State], finite: Tensor) -> Tensor:
    """Increment the step count of every state if `finite`; returns the counts (count,), float32 as in torch's Adam.

    Not in torch's default dtype: bfloat16 cannot count beyond 256.
    """
    zero = torch.zeros((), dtype=torch.float32, device=finite.device)
    steps = torch.stack([state.get("step", zero).to(finite.device, torch.float32) for state in states]) + finite
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
    return steps


class _Rows:
    """The states' tensors `name` (size,) as the rows of one storage, so that one kernel updates all.

    They become such rows in the first step of their weights, and when a state is loaded (`stack_states`). Where other
    weights have a gradient than in that step, as with experts, the rows are read and written one by one: another
    storage for each set of weights would leave the earlier ones in use by the weights that are not in it.

    Args:
        states: new ones start with `fill`, in the dtype of `like`.
        name: of the tensor.
        size: its number of entries.
        like: tells dtype and device.
        fill: see `states`.
    """

    def __init__(self, states: Sequence[State], name: str, size: int, like: Tensor, fill: int = 0) -> None:
        if all(name not in state for state in states):
            for row, state in zip(like.new_full((len(states), size), fill), states, strict=True):
                state[name] = row
        for state in states:
            if name not in state:
                state[name] = like.new_full((size,), fill)
        if any(state[name].device != like.device for state in states):
            for state in states:
                state[name] = state[name].to(like.device)
            stack_states(states, (name,))
        self._parts: list[Tensor] = [state[name] for state in states]
        is_stack = _are_rows(self._parts, size)
        self._whole = self._parts[0].as_strided((len(self._parts), size), (size, 1)) if is_stack else None

    def read(self) -> Tensor:
        """All rows (count, size); perhaps not a copy."""
        return torch.stack(self._parts) if self._whole is None else self._whole

    def gather(self, index: Tensor) -> Tensor:
        """Entries (count, k) at positions (count, k)."""
        if self._whole is not None:
            return self._whole.gather(1, index)
        return torch.stack([part.gather(0, one) for part, one in zip(self._parts, index, strict=True)])

    def scatter(self, index: Tensor, values: Tensor) -> None:
        """Write entries (count, k) at positions (count, k)."""
        if self._whole is not None:
            self._whole.scatter_(1, index, values)
            return
        for part, one, value in zip(self._parts, index, values, strict=True):
            part.scatter_(0, one, value)

    def write(self, whole: Tensor) -> None:
        """Write all rows (count, size)."""
        if self._whole is not None:
            self._whole.copy_(whole)
            return
        for part, row in zip(self._parts, whole, strict=True):
            part.copy_(row)


def stack_states(states: Sequence[State], names: Sequence[str] = _STACKED) -> None:
    """Make the moments of several weights, as they are loaded, rows of one storage for each name, size and device."""
    for name in names:
        alike: dict[tuple[Any, ...], list[State]] = {}
        for state in states:
            if name in state:
                part = state[name]
                alike.setdefault((part.numel(), part.dtype, part.device), []).append(state)
        for found in alike.values():
            for state, row in zip(found, torch.stack([state[name].flatten() for state in found]), strict=True):
                state[name] = row


def _are_rows(parts: Sequence[Tensor], size: int) -> bool:
    """Whether the tensors are consecutive rows of one storage."""
    first = parts[0]
    storage, step = first.untyped_storage().data_ptr(), size * first.element_size()
    return all(
        part.untyped_storage().data_ptr() == storage and part.data_ptr() == first.data_ptr() + number * step
        for number, part in enumerate(parts)
    )


def _load_slots(states: Sequence[State], slots: int, like: Tensor) -> dict[str, _Rows]:
    """The slots of all states, as rows of tensors (count, slots); those of a new state are empty."""
    if resized := [state for state in states if "index" in state and len(state["index"]) != slots]:
        for state in resized:
            _resize(state, slots)
        stack_states(resized)
    whole = like.new_empty(0, dtype=torch.int32)
    moments = {name: _Rows(states, name, slots, like) for name in ("exp_avg", "exp_avg_sq")}
    counts = {name: _Rows(states, name, slots, whole) for name in ("age", "used")}
    return {"index": _Rows(states, "index", slots, whole, _EMPTY), **moments, **counts}


def _resize(state: State, slots: int) -> None:
    """Give a state another number of slots, as after a change of the density: fewer keep the most recent entries."""
    index, used = state["index"], state["used"]
    chosen = _rank(used, index).topk(min(slots, len(index)), sorted=False).indices.sort().values
    for name, fill in (("index", _EMPTY), ("exp_avg", 0), ("exp_avg_sq", 0), ("age", 0), ("used", 0)):
        resized = state[name].new_full((slots,), fill)
        resized[: len(chosen)] = state[name][chosen]
        state[name] = resized


def _rank(used: Tensor, position: Tensor) -> Tensor:
    """Numbers by which slots are kept: the most recent, and of those the ones of the lowest positions.

    Devices would choose differently among equal numbers.
    """
    return (used.long() << 32) - position


def _find_latest(old: dict[str, Tensor], new: dict[str, Tensor], place: Tensor, known: Tensor) -> dict[str, Tensor]:
    """The most recently used of the old and new entries: name -> slots (count, slots), sorted by position.

    Args:
        old, new: name -> slots (count, slots) and kept entries (count, k).
        place: slot (count, k) of each new entry that is known.
        known: which new entries replace an old one, whose copy in `old` is then discarded.
    """
    # A new position that has no slot may have the place of one that has: only a sum keeps both, in any order.
    replaced = torch.zeros_like(old["used"]).scatter_add_(1, place, known.int())
    stale = old["used"].masked_fill(replaced > 0, -1)
    slots = old["index"].shape[1]
    position = torch.cat([old["index"], new["index"]], 1)
    chosen = _rank(torch.cat([stale, new["used"]], 1), position).topk(slots, sorted=False).indices
    merged = {name: torch.cat([old[name], new[name]], 1).gather(1, chosen) for name in old}
    order = merged["index"].argsort(1)
    return {name: tensor.gather(1, order) for name, tensor in merged.items()}
