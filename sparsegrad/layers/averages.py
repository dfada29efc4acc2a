"""Torch's average of a model's weights, `AveragedModel`, around layers of engine `fast`.

The effective weight W + V_c (core - merged) U_r^T of a `BlockLinear` is averaged by averaging all three. By default
`AveragedModel` averages the parameters W and core alone and copies the buffer `merged`, which gives a wrong weight.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from sparsegrad.errors import UserError

if TYPE_CHECKING:
    from sparsegrad.layers.block import BlockLinear

_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AveragedModel]] = weakref.WeakKeyDictionary()


@functools.cache
def watch_averages() -> None:
    """From now on, remember which modules an `AveragedModel` holds; a module cannot tell who holds it."""
    register_module_module_registration_hook(_note_owner)


def _note_owner(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if isinstance(owner, AveragedModel) and module is not None:
        _owners.update((one, weakref.ref(owner)) for one in module.modules() if hasattr(one, "core"))


def refuse_partial_average(block: BlockLinear) -> None:
    """Raise `UserError` for a layer of an `AveragedModel` that leaves out the buffers."""
    found = _owners.get(block)
    owner = None if found is None else found()
    if owner is not None and not owner.use_buffers:
        raise UserError(
            "AveragedModel averages the weights of engine fast, but not the buffers that belong to them: make it as "
            "AveragedModel(model, use_buffers=True)"
        )
