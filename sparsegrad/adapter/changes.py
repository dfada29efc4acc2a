"""Which tensors of a model differ from those of its base, bit for bit, and whether an adapter can store them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsegrad.adapter.format import DTYPES, HALVES
from sparsegrad.adapter.merge import check_present, named_tensors
from sparsegrad.errors import UserError


def find_changed(
    model: nn.Module, before: Mapping[str, Tensor], new: set[str], trained: Collection[str]
) -> dict[str, Tensor]:
    """The model's tensors whose bits differ from those of the base, by name, in the model's order.

    Args:
        model: the plain model.
        before: the base's tensors by name.
        new: names of tensors that the base does not have; they count as changed.
        trained: names of the parameters that the base must not share with the model, because training moved both.

    Raises:
        UserError: for a base that shares tensors with the model, or has another shape or dtype; a changed tensor that
            is not finite or that an adapter cannot store; tensors without values; or no change at all.
    """
    changed, moving = {}, {*trained, *_list_statistics(model)} - new
    for name, tensor in named_tensors(model).items():
        check_present(name, tensor)
        if name not in new:
            check_present(f"{name} of the base", before[name])
        if name in moving:
            _refuse_shared(name, tensor, before[name])
        if name in new or _differs(name, tensor, before[name]):
            _check_storable(name, tensor)
            changed[name] = tensor
    if not changed:
        raise UserError("the model equals its base in every weight: train it first, or name the base it came from")
    return changed


def find_narrow(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of 16 bits that holds every value of wider floating-point tensors; None without one."""
    for dtype in HALVES:
        if tensors and all(
            one.dtype in (torch.float32, torch.float64) and torch.equal(one.to(dtype).to(one.dtype), one)
            for one in tensors
        ):
            return dtype
    return None


def list_trainable(model: nn.Module) -> set[str]:
    """Names of the parameters that require a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _list_statistics(model: nn.Module) -> set[str]:
    """Names of the buffers that forward passes change while a model trains: those of batch normalization."""
    owners = {name: one for name, one in model.named_modules() if getattr(one, "track_running_stats", False)}
    return {f"{name}.{buffer}" for name, one in owners.items() for buffer, _ in one.named_buffers(recurse=False)}


def _refuse_shared(name: str, tensor: Tensor, old: Tensor) -> None:
    """Raise `UserError` if both are the same memory: then training has changed the base as well."""
    if tensor.device == old.device and tensor.data_ptr() == old.data_ptr() and tensor.numel():
        raise UserError(
            f"base= shares the memory of {name} with the model, so training has changed both: give the folder or hub "
            "id that the model came from, or a copy from before training, copy.deepcopy(model.state_dict())"
        )


def _differs(name: str, tensor: Tensor, old: Tensor) -> bool:
    if (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
        raise UserError(
            f"{name} is {tuple(old.shape)} {old.dtype} in the base and {tuple(tensor.shape)} {tensor.dtype} in the "
            "model: give the base that the model was trained from"
        )
    return not _view_bytes(old).equal(_view_bytes(tensor))


def _view_bytes(tensor: Tensor) -> Tensor:
    """All bytes of a tensor, on the CPU, so that the comparison does not depend on the dtype."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _check_storable(name: str, tensor: Tensor) -> None:
    """Raise `UserError` for an unsupported dtype, or values that are not finite."""
    if str(tensor.dtype) not in DTYPES:
        raise UserError(
            f"{name} is {tensor.dtype}, which an adapter cannot store; it stores {', '.join(DTYPES)}: convert it in "
            "the model and its base, or register the buffer with persistent=False"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} is not finite: the training diverged; go back to an earlier checkpoint")
