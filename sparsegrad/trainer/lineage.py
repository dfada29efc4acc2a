"""The processes that have trained one run: which steps each took, with what code and on what machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHARED = ("versions", "hardware")  # left out of a record where they are those of its last process


class Lineage:
    """The processes of a run that was stopped and continued.

    Args:
        environment: of this process, as a record describes it: versions, git state, hardware, time of its start.
    """

    def __init__(self, environment: Mapping[str, Any]) -> None:
        self._environment = dict(environment)
        self._earlier: list[dict[str, Any]] = []
        self._begun = 0  # last step of the earlier processes

    def state(self, step: int) -> list[dict[str, Any]]:
        """What a checkpoint stores: the processes that trained up to `step`."""
        own = {"first_step": self._begun + 1, "last_step": step, **self._environment}
        return [*self._earlier, own] if step > self._begun else self._earlier

    def restore(self, state: Sequence[Mapping[str, Any]] | None, step: int) -> None:
        """Continue after `step` what `state` has returned; None for a checkpoint of a version that did not store it."""
        known = [{"first_step": 1, "last_step": step}] if state is None else state
        self._earlier, self._begun = [dict(one) for one in known], step

    def describe(self) -> list[dict[str, Any]]:
        """The earlier processes for the record; empty for a run of a single process."""
        own = self._environment
        return [
            {name: value for name, value in one.items() if name not in _SHARED or value != own.get(name)}
            for one in self._earlier
        ]
