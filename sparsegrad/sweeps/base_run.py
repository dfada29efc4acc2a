"""Whether the run with the values that are not searched can start, which tells a refused trial from a refused sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback

from sparsegrad.errors import UserError
from sparsegrad.runs.config import TrackerConfig
from sparsegrad.sweeps.config import SweepPlan


class _StartedError(Exception):
    """Training would begin now. No `UserError`, for which a run writes a failed record."""


class _StopAtStart(TrainerCallback):  # type: ignore[misc]
    def on_train_begin(self, *_: Any, **__: Any) -> NoReturn:
        raise _StartedError


def can_start(plan: SweepPlan, run: Callable[..., Any]) -> bool:
    """Set up the run of `plan.base`, calibration included, and stop where its training would begin.

    It leaves no record, no checkpoint and no tracker run.

    Args:
        plan: the sweep.
        run: what runs a trial, such as `sparsegrad.runs.run`.
    """
    try:
        base = plan.trial_config({})  # anew: what it names may have gone since the sweep began
        Path(base.work_dir).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=base.work_dir) as folder:
            # With force, because a complete record would hide that, for example, the data is gone.
            probe = replace(base, work_dir=folder, force=True, tracker=TrackerConfig(name="none"))
            run(probe, callbacks=[_StopAtStart()], labels={})
    except (UserError, OSError, torch.OutOfMemoryError):  # without memory it is not known
        return False
    except _StartedError:
        pass
    return True  # also for a runner of the user's own that finishes without calling back
