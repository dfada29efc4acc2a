"""Saved states of `SparseGradAdamW`: what is stored of a group, and whether a state belongs to an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsegrad.basis import Basis
from sparsegrad.errors import UserError
from sparsegrad.optim.group_checks import is_sparse

Group = dict[str, Any]

_SAME_DIRECTION = 0.02  # at most: what bases of the same calibration differ by, even in bfloat16
# Parts of names that DDP, torch.compile, FSDP and activation checkpoints put in.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Of peft, around a layer that it trains as a whole or wraps.
_WRAPPERS |= {"modules_to_save", "default", "base_layer", "original_module"}
_UNNAMED = "unnamed."  # begins the names that `with_names` gives


def pack_group(group: Group) -> Group:
    """A group of a state dict with its basis as plain tensors, and without what belongs to the model's layers."""
    basis: Basis | None = group["basis"]
    packed = None if basis is None else {"in_basis": basis.in_basis, "out_basis": basis.out_basis}
    kept = {name: value for name, value in group.items() if name != "rotation"}
    return {**kept, "basis": packed}


def unpack_group(group: Group) -> Group:
    """The reverse of `pack_group`."""
    basis = group.get("basis")
    return {**group, "basis": Basis(**basis) if isinstance(basis, dict) else basis}


def keep_layers(group: Group, own: Group) -> None:
    """Give a loaded group what belongs to the model's layers, whether the saved state has it or not.

    Who rotates is a matter of this model's layers: the saved moments are of the rotated space in either case. The
    layers rotate by the saved basis from now on.
    """
    if "directions" in own:
        group["directions"] = own["directions"]
    group["rotation"] = rotation = own["rotation"]
    if is_sparse(group) and rotation is not None:
        rotation.load(group["basis"])


def check_saved(groups: list[Group], saved: list[Group]) -> None:
    """Check that a saved state has the engine, the moments, the weights and, with engine `fast`, the bases of `groups`.

    Names and kinds are compared where both have them: states of earlier versions may have neither.
    """
    for mine, theirs in zip(groups, saved, strict=False):  # torch itself refuses another number of groups
        _check_engine(mine, theirs)
        _check_weights(mine, theirs)
        if _has_other_directions(mine, theirs):
            raise UserError(
                f"the saved state is of cores between other bases of kind {mine['kind']}: give prepare those of its "
                "calibration, bases=load_bases(...), or start without that state"
            )


def _check_engine(mine: Group, theirs: Group) -> None:
    """Check that both groups are of one engine, both SparseGrad or both plain, and with the same moments."""
    names = ("SparseGrad", "plain AdamW")
    if _is_plain(theirs) != _is_plain(mine):
        was, now = names if _is_plain(mine) else reversed(names)
        raise UserError(
            f"a group of the saved state is trained by {was}, that of this optimizer by {now}: give prepare the same "
            "target_modules= as then, or start without that state if it is of another optimizer"
        )
    if (engine := _get_engine(theirs)) != _get_engine(mine):
        raise UserError(
            f"the saved state is of engine={engine}, this optimizer of engine={_get_engine(mine)}: "
            f"make it with engine={engine}, or start without that state"
        )
    if (kind := theirs.get("moments", "dense")) != mine["moments"]:
        raise UserError(
            f"the saved state has moments={kind}, this optimizer moments={mine['moments']}: "
            f"make it with moments={kind}, or start without that state"
        )


def _check_weights(mine: Group, theirs: Group) -> None:
    """Check that both groups hold the same target weights in the same order; without names, of the same kind.

    Names of other parameters may change, such as that of a head, or with a version of transformers.
    """
    if _is_plain(mine):
        return
    own, saved = mine.get("param_names"), theirs.get("param_names")
    if own is not None and saved is not None:
        pair = _find_other(own, saved) if len(own) == len(saved) else None  # torch refuses another number
    else:
        kinds = mine.get("kind"), theirs.get("kind")
        pair = None if None in kinds or kinds[0] == kinds[1] else (str(kinds[0]), str(kinds[1]))
    if pair is not None:
        raise UserError(
            f"the saved state has {pair[1]} where this optimizer has {pair[0]}: give prepare the same target_modules= "
            "in the same order, for the same model, or start without that state"
        )


def _find_other(own: Sequence[str], saved: Sequence[str]) -> tuple[str, str] | None:
    """The first two names that mean different parameters; one may be of a model within the other's."""
    for pair in zip(own, saved, strict=True):
        mine, theirs = (f".{_unwrap_name(name)}" for name in pair)
        if not (mine.endswith(theirs) or theirs.endswith(mine) or any(name.startswith(_UNNAMED) for name in pair)):
            return pair
    return None


def _unwrap_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _has_other_directions(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two groups of cores have different bases, as far as both tell: states of older versions do not."""
    own, saved = mine.get("directions"), theirs.get("directions")
    if own is None or saved is None:
        return False
    return len(own) != len(saved) or any(abs(a - b) > _SAME_DIRECTION for a, b in zip(own, saved, strict=True))


def _is_plain(group: Group) -> bool:
    """Whether a group is trained by plain AdamW, as the parameters beside the target weights."""
    return not is_sparse(group) and not group.get("weight_shape")


def _get_engine(group: Mapping[str, Any]) -> str:
    """The engine that made a group: only that of `fast` records the shape of the weight beside its core."""
    return "fast" if group.get("weight_shape") else "exact"
