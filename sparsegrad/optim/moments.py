"""Adam on kept entries: which moments exist, and the change they give (paper, section 3.2; `torch.optim.SparseAdam`).

Both functions take the kept entries of `count` weights of one shape at once. Where `finite` (a bool on the device) is
False they leave all moments and step counts as they are and give a change of zero: no look at the values, so no wait
for a GPU. For that the counts are on the device too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
_EMPTY = torch.iinfo(torch.int32).max
_SLOTS = 4  # moments that `support` has room for, in multiples of the kept entries


def dense_moments(
    states: Sequence[State], index: Tensor, values: Tensor, size: int, group: State, finite: Tensor
) -> Tensor:
    """The method's own: two moments for every entry of a weight, of which a step touches the kept ones.

    One step count for all entries, as `torch.optim.SparseAdam` has; it adds `eps` before the bias correction of the
    second moment, `AdamW` after it.

    Args:
        states: of each weight: `step`, `exp_avg` and `exp_avg_sq` (size,); filled in when empty.
        index, values: flat positions and rotated gradients (count, k) of the kept entries.
        size: entries of a weight, out * in.
        group: `lr`, `betas`, `eps`.
        finite: whether the step counts.

    Returns:
        The change (count, k) of the rotated weights at `index`.
    """
    first, second = (_together(states, name, size, values) for name in ("exp_avg", "exp_avg_sq"))
    (beta1, beta2), steps = group["betas"], _next_steps(states, finite)
    m, v = first.gather(1, index), second.gather(1, index)
    m, v = _blend(m, v, values, group["betas"], finite)
    first.scatter_(1, index, m)
    second.scatter_(1, index, v)
    exponents = steps.double().clamp(min=1)  # none counts as long as all were refused
    scales = -group["lr"] * (1 - beta2**exponents).sqrt() / (1 - beta1**exponents) * finite
    change: Tensor = m / (v.sqrt() + group["eps"]) * scales.to(m.dtype)[:, None]
    return change


def support_moments(
    states: Sequence[State], index: Tensor, values: Tensor, size: int, group: State, finite: Tensor
) -> Tensor:
    """Moments only for the entries kept most recently, four times as many as a step keeps: not exact.

    An entry that has not been kept for long loses its moments; when it comes back it starts as a new one. So each has
    its own age, and the bias correction is Adam's with that age instead of the step count. At 1 % density this is a
    tenth of the dense moments.

    Args, Returns: as `dense_moments`; a state holds `step` and, of each slot, `index` (sorted), `exp_avg`,
        `exp_avg_sq`, `age` (updates so far) and `used` (the step of its last update).
    """
    (beta1, beta2), steps = group["betas"], _next_steps(states, finite)
    slots = min(_SLOTS * index.shape[1], size)
    old = _slots(states, slots, values)
    order = index.argsort(1)
    key, gradient = index.gather(1, order).int(), values.gather(1, order)
    place = torch.searchsorted(old["index"], key).clamp_(max=slots - 1)
    known = old["index"].gather(1, place) == key
    m, v, age = (old[name].gather(1, place) * known for name in ("exp_avg", "exp_avg_sq", "age"))
    m, v = _blend(m, v, gradient, group["betas"], finite)
    age = age + finite
    # An unused entry loses every contest for a slot: so do all of a step that does not count.
    used = torch.where(finite, steps.int()[:, None].expand_as(key), -1)
    _keep_latest(
        states, old, {"index": key, "exp_avg": m, "exp_avg_sq": v, "age": age, "used": used}, place, known & finite
    )
    years = age.clamp(min=1).to(m.dtype)
    change = (m / (1 - beta1**years)) / ((v / (1 - beta2**years)).sqrt() + group["eps"]) * -group["lr"]
    return torch.zeros_like(values).scatter_(1, order, change * finite)


MOMENTS: dict[str, Callable[..., Tensor]] = {"dense": dense_moments, "support": support_moments}


def _blend(m: Tensor, v: Tensor, gradient: Tensor, betas: tuple[float, float], finite: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments moved towards the gradient and its square; not at all where the step does not count."""
    gradient = torch.where(finite, gradient, 0)
    weights = [finite.to(m.dtype) * (1 - beta) for beta in betas]
    return m + (gradient - m) * weights[0], v + (gradient * gradient - v) * weights[1]


def _next_steps(states: Sequence[State], finite: Tensor) -> Tensor:
    """Count one step more in every state if `finite`; the counts (count,), in float32 as torch's optimizers have it."""
    zero = torch.zeros((), device=finite.device)
    steps = torch.stack([state.get("step", zero).to(finite.device) for state in states]) + finite
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
    return steps


def _together(states: Sequence[State], name: str, size: int, like: Tensor) -> Tensor:
    """The states' tensors `name` as one (count, size): views of one storage, so that one kernel serves them all."""
    parts: list[Tensor | None] = [state.get(name) for state in states]
    first = parts[0]
    if first is not None and _are_rows(parts, size, like.device):
        return first.as_strided((len(parts), size), (size, 1))
    whole = like.new_zeros(len(parts), size)
    for row, part, state in zip(whole, parts, states, strict=True):
        if part is not None:
            row.copy_(part.flatten())
        state[name] = row
    return whole


def _are_rows(parts: Sequence[Tensor | None], size: int, device: torch.device) -> bool:
    """Whether the tensors lie one after the other in one storage on `device`."""
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


def _slots(states: Sequence[State], slots: int, like: Tensor) -> dict[str, Tensor]:
    """The slots of all states as tensors (count, slots); empty ones hold a position beyond every weight."""

    def tensor(state: State, name: str) -> Tensor:
        if name in state:
            return state[name]  # type: ignore[no-any-return]
        dtype = like.dtype if name.startswith("exp") else torch.int32
        return torch.full((slots,), _EMPTY if name == "index" else 0, dtype=dtype, device=like.device)

    names = ("index", "exp_avg", "exp_avg_sq", "age", "used")
    return {name: torch.stack([tensor(state, name) for state in states]) for name in names}


def _keep_latest(
    states: Sequence[State], old: dict[str, Tensor], new: dict[str, Tensor], place: Tensor, known: Tensor
) -> None:
    """Store the most recently used of old and new entries, sorted by position; a known one is in `new` alone."""
    stale = old["used"].scatter(1, place, torch.where(known, -1, old["used"].gather(1, place)))
    slots = old["index"].shape[1]
    chosen = torch.cat([stale, new["used"]], 1).topk(slots, sorted=False).indices
    merged = {name: torch.cat([old[name], new[name]], 1).gather(1, chosen) for name in old}
    order = merged["index"].argsort(1)
    for name, tensor in merged.items():
        for state, row in zip(states, tensor.gather(1, order), strict=True):
            state[name] = row.clone()
