"""Choose the device of a process."""

from __future__ import annotations

import torch

from sparsegrad.errors import check_choice, fail


def pick_device(name: str, option: str = "train.device") -> torch.device:
    """Return the device for `auto` (the GPU if there is one), `cpu` or `cuda`; `option` is named in errors.

    Raises:
        UserError: for another name, or for `cuda` on a machine without CUDA.
    """
    check_choice(option, name, ("auto", "cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise fail(option, name, "this machine has no CUDA device", "use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
