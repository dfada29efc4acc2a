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
    first, second = (_stack_rows(states, name, size, values) for name in ("exp_avg", "exp_avg_sq"))
    (beta1, beta2), steps = group["betas"], _count_step(states, finite)
    m, v = first.gather(1, index), second.gather(1, index)
    m, v = _update_moments(m, v, values, group["betas"], finite)
    first.scatter_(1, index, m)
    second.scatter_(1, index, v)
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
    old = _load_slots(states, slots, values)  # name -> (count, slots)
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
    _store_latest(states, old, new, place, known & finite)
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


def _stack_rows(states: Sequence[State], name: str, size: int, like: Tensor, fill: int = 0) -> Tensor:
    """The states' tensors `name` as one tensor (count, size), of which each is a row, so that one kernel updates all.

    If they are rows of one storage already, no data is copied. That fails on the first step, after loading a state,
    and when the weights that have a gradient change. A new state starts with `fill`, in the dtype of `like`.
    """
    parts: list[Tensor | None] = [state.get(name) for state in states]
    first = parts[0]
    if first is not None and _are_rows(parts, size, like.device):
        return first.as_strided((len(parts), size), (size, 1))
    whole = like.new_full((len(parts), size), fill)
    for row, part, state in zip(whole, parts, states, strict=True):
        if part is not None:
            row.copy_(part.flatten())
        state[name] = row
    return whole


def _are_rows(parts: Sequence[Tensor | None], size: int, device: torch.device) -> bool:
    """Whether the tensors are consecutive rows of one storage on `device`."""
    first = parts[0]
    assert first is not None
    storage, step = first.untyped_storage().data_ptr(), size * first.element_size()
    return all(
        part is not None
        and part.device == device
        and part.untyped_storage().data_ptr() == storage
        and part.data_ptr() == first.data_ptr() + number * step
        for number, part in enumerate(parts)
    )


def _load_slots(states: Sequence[State], slots: int, like: Tensor) -> dict[str, Tensor]:
    """The slots of all states as tensors (count, slots); those of a new state are empty."""
    for state in states:
        if "index" in state and len(state["index"]) != slots:
            _resize(state, slots)
    whole = like.new_empty(0, dtype=torch.int32)
    moments = {name: _stack_rows(states, name, slots, like) for name in ("exp_avg", "exp_avg_sq")}
    counts = {name: _stack_rows(states, name, slots, whole) for name in ("age", "used")}
    return {"index": _stack_rows(states, "index", slots, whole, _EMPTY), **moments, **counts}


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


def _store_latest(
    states: Sequence[State], old: dict[str, Tensor], new: dict[str, Tensor], place: Tensor, known: Tensor
) -> None:
    """Store the most recently used of the old and new entries in the states, sorted by position.

    Args:
        states: updated in place.
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
    for name, tensor in merged.items():
        for state, row in zip(states, tensor.gather(1, order), strict=True):
            state[name] = row  # of one storage, see `_stack_rows`
