"""Which entries of a gradient are kept: how many, and where (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsegrad.basis import Basis
from sparsegrad.distributed import is_shard, shards_error
from sparsegrad.errors import UserError, check_integer, check_number
from sparsegrad.optim.scratch import Scratch

# Largest number of entries of all weights that are rotated together. On a GPU: all blocks of a base-size model, so that
# a layer kind is one batched product; the temporary copies of a step, four times 128 MiB in float32, exist when the
# activations are gone. On a CPU: what fits into the cache; processing large weights together was up to a third slower
# than one by one (3072 x 768, one thread).
_TOGETHER = {"cpu": 2**18, "elsewhere": 2**25}

_SAMPLE_FROM = 2**16  # entries; in smaller matrices sampling saves no time
_SAMPLE_STRIDE = 31  # prime, so that the sample covers all columns of matrices of the usual widths


def count_kept(
    shape: Sequence[int], *, keep: int | None = None, density: float | None = None, name: str = "a weight"
) -> int:
    """Number of kept entries of a weight of `shape` (out, in): `keep` itself, or `density` of its entries.

    Args:
        shape: of the weight.
        keep: number of kept entries.
        density: their share, instead of `keep`.
        name: what an error calls the weight.

    Raises:
        UserError: when both or neither are given, `density` is outside (0, 1] or keeps no entry, or `keep` is outside
            1 .. out * in.
    """
    size = shape[0] * shape[1]
    if (keep is None) == (density is None):
        raise UserError(f"keep={keep} and density={density}: give exactly one of them")
    if density is None:
        return check_integer("keep", keep, at_least=1, at_most=size, remedy=f"{name} {tuple(shape)} has {size} entries")
    check_density(density)
    kept = round(density * size)
    if kept < 1:
        raise UserError(
            f"density={density} keeps no entry of {name} {tuple(shape)}: give at least {1 / size:.2g}, or "
            f"leave {name} out of the target weights"
        )
    return kept


def check_density(density: float | None) -> float | None:
    """Return `density` if it is None or in (0, 1], or raise `UserError`."""
    if density is not None:
        check_number("density", density, above=0, at_most=1, remedy="the paper keeps 0.01")
    return density


@dataclass(frozen=True)
class Selection:
    """The kept entries of some weights of one parameter group.

    Attributes:
        group: the parameter group.
        weights: `count` weights of one shape (out, in).
        index: flat positions (count, k) of the kept entries.
        values: their rotated gradients (count, k), float32 or float64.
        basis: the group's basis on the device of the weights; None: they are not rotated.
    """

    group: dict[str, Any]
    weights: list[Tensor]
    index: Tensor
    values: Tensor
    basis: Basis | None


def together(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Split the weights that have a gradient into lists that are rotated together; a sparse gradient is alone."""
    batch: list[Tensor] = []
    for weight in (weight for weight in weights if weight.grad is not None):
        alike = batch and all(getattr(batch[0], name) == getattr(weight, name) for name in ("shape", "dtype", "device"))
        limit = _TOGETHER["cpu" if weight.is_cpu else "elsewhere"]
        if batch and (not alike or weight.grad.is_sparse or (len(batch) + 1) * weight.numel() > limit):  # type: ignore[union-attr]
            yield batch
            batch = []
        batch.append(weight)
    if batch:
        yield batch


def select(
    group: dict[str, Any], weights: list[Tensor], states: Mapping[Tensor, dict[str, Any]], scratch: Scratch
) -> Selection:
    """Select the kept entries of the gradients of weights, rotated by the group's basis.

    Args:
        group: with `basis`, `keep` and `density`; and `rotation`, if the layers have rotated the gradients already.
        weights: of one shape (out, in), all with a gradient.
        states: the optimizer's state of each weight; `positions` (k,), if it has them, are kept instead of the largest.
        scratch: buffers of this step.
    """
    first = weights[0]
    if is_shard(first):  # sharded after the optimizer was created, as Accelerate's FSDP does
        raise shards_error(f"a weight {tuple(first.shape)} is")
    dtype = torch.promote_types(first.dtype, torch.float32)
    if first.grad.is_sparse:  # type: ignore[union-attr]
        return Selection(group, weights, *_read_sparse(first.grad, dtype), group["basis"])  # type: ignore[arg-type]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    # (count, out, in); a single gradient is not copied.
    stacked = gradients[0][None] if len(gradients) == 1 else torch.stack(gradients)
    rotated, basis = _rotate(group, first, stacked)
    rotated = rotated.to(dtype)
    if "positions" in states.get(first, {}):  # chosen once, by `methods.static_mask.fix_positions`
        index = torch.stack([states[weight]["positions"] for weight in weights])
    else:
        index = top_k_index(rotated, count_kept(first.shape, keep=group["keep"], density=group["density"]), scratch)
    values = rotated.flatten(1).gather(1, index)
    if group["rotation"] is not None:
        group["rotation"].check_gradients(index, values, first.shape[1])
    return Selection(group, weights, index, values, basis)


def _rotate(group: dict[str, Any], weight: Tensor, gradients: Tensor) -> tuple[Tensor, Basis | None]:
    """Rotate gradients (count, out, in) of weights like `weight`, unless their layers have done so.

    Also returns the basis on the device of `weight`. The model may have moved since the optimizer was created:
    `group["basis"]` follows it. After the first step this changes nothing.
    """
    dtype, rotation = torch.promote_types(weight.dtype, torch.float32), group["rotation"]
    if rotation is None:
        if group["basis"] is None:
            return gradients, None
        basis = own = group["basis"] = group["basis"].to(weight.device, dtype).by_columns()
    else:
        basis = rotation.place(weight.device, dtype)
        group["basis"] = rotation.basis
        if rotation.in_layers:
            return gradients, basis
        own = rotation.for_gradients(weight)
    return own.rotate(gradients.to(own.dtype)), basis


def _read_sparse(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat positions and values (1, k) of a sparse COO gradient, as engine `layer` computes it."""
    gradient = gradient.coalesce()
    rows, columns = gradient.indices()
    return (rows * gradient.shape[1] + columns)[None], gradient.values().to(dtype)[None]


def top_k_index(gradient: Tensor, keep: int, scratch: Scratch | None = None) -> Tensor:
    """Flat positions (..., keep) of the entries with the largest magnitude in each matrix (..., out, in).

    They are ascending on a CPU, where later steps need them sorted, and unordered elsewhere.
    """
    if not gradient.is_cpu:
        return gradient.abs().flatten(-2).topk(keep, sorted=False).indices
    size = gradient.shape[-2] * gradient.shape[-1]
    scratch = Scratch() if scratch is None else scratch
    magnitudes = torch.abs(gradient, out=scratch.get("magnitudes", gradient.shape, gradient)).view(-1, size)
    if size < _SAMPLE_FROM:
        index = magnitudes.topk(keep, sorted=False).indices.sort().values
    else:  # on a CPU `topk` of a large matrix is slow: see `_find_candidates`
        index = torch.stack([_top_k_by_sample(row, keep) for row in magnitudes])
    return index.view(*gradient.shape[:-2], keep)


def _top_k_by_sample(magnitudes: Tensor, keep: int) -> Tensor:
    """Ascending positions (keep,) of the largest of `magnitudes` (n,); of the candidates if they are enough."""
    candidates = _find_candidates(magnitudes, keep)
    if len(candidates) < keep:
        return magnitudes.topk(keep, sorted=False).indices.sort().values
    values = magnitudes[candidates]
    # As in `_find_candidates`, entries that are not below the smallest kept one, so that NaN is kept.
    kept = _find_true((values < values.topk(keep, sorted=False).values.min()).logical_not_())
    if len(kept) > keep:  # equal entries at the limit
        kept = values.topk(keep, sorted=False).indices.sort().values
    return candidates[kept]


def _find_candidates(magnitudes: Tensor, keep: int) -> Tensor:
    """Ascending positions of all entries of `magnitudes` (n,) above a threshold slightly below the `keep`-th largest.

    The threshold is estimated from every 31st entry. If at least `keep` entries are above it, they include the `keep`
    largest, so the result of `topk` on them is exact. On a CPU `topk` of all entries takes 4 to 9 times as long.

    As in `topk`, NaN counts as the largest value: it is not below the threshold, and if the threshold itself is NaN,
    every entry is a candidate.
    """
    sample = magnitudes[::_SAMPLE_STRIDE]
    # The share of the sample that `keep` is of all, plus a quarter and 32 entries of margin for its random error.
    wanted = min(len(sample), keep * 5 // (4 * _SAMPLE_STRIDE) + 32)
    threshold = sample.kthvalue(len(sample) - wanted + 1).values  # the `wanted`-th largest
    return _find_true((magnitudes < threshold).logical_not_())


def _find_true(mask: Tensor) -> Tensor:
    """Positions of the true entries of `mask` (n,), most of which are false; ascending.

    Eight bytes are tested at once: three times as fast as `nonzero` where one entry in a hundred is true.
    """
    if len(mask) % 8:
        return mask.nonzero().flatten()
    hits = mask.view(torch.int64).nonzero().flatten()
    within = mask.view(-1, 8)[hits].nonzero()  # (count, 2): which hit, which of its eight
    return hits[within[:, 0]] * 8 + within[:, 1]
