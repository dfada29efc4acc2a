"""Which trials count: N slots, each with one chain of attempts, derived from the study's trials alone.

Every worker reads the same trials and reaches the same result, so no coordinator is needed:

- A *fresh* trial takes the next slot. Its slot is the number of fresh trials with lower numbers, which never changes.
- Fresh trials beyond slot N, which appear if several workers ask at once, are *surplus*: they are not run.
- A failed trial is attempted again by a *redo* with the same values. Of several redos of a trial, the first counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from optuna.trial import FrozenTrial, TrialState

REDO_OF, SURPLUS, FAILURE, REASON = "redo_of", "surplus", "failure", "reason"
RECORD_SECONDS = "record_seconds"  # of the run itself, in a trial that only found its record
# DIED and CRASHED count against `sweep.retries`; a stop by the user, or a mistake that the user can correct, does not.
# A trial is pruned for a MISTAKE that is due to its own values.
DIED, CRASHED, STOPPED, MISTAKE = "died", "crashed", "stopped", "mistake"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Ledger:
    """The slots of a study, from a snapshot of its trials."""

    def __init__(self, trials: Iterable[FrozenTrial]) -> None:
        self.trials: Sequence[FrozenTrial] = sorted(trials, key=lambda trial: trial.number)

    @cached_property
    def fresh(self) -> list[int]:
        """Numbers of the fresh trials, by slot."""
        return [one.number for one in self.trials if REDO_OF not in one.user_attrs and SURPLUS not in one.user_attrs]

    @cached_property
    def _by_number(self) -> dict[int, FrozenTrial]:
        return {trial.number: trial for trial in self.trials}

    @cached_property
    def _redos(self) -> dict[int, int]:
        """Number of a trial -> number of the redo that counts."""
        redos: dict[int, int] = {}
        for trial in self.trials:
            if REDO_OF in trial.user_attrs:
                redos.setdefault(trial.user_attrs[REDO_OF], trial.number)  # trials are sorted: the first counts
        return redos

    def attempts(self, slot: int) -> list[FrozenTrial]:
        """Return the attempts at a slot, in order."""
        chain = [self.fresh[slot]]
        while chain[-1] in self._redos:
            chain.append(self._redos[chain[-1]])
        return [self._by_number[number] for number in chain]

    def history(self, number: int) -> list[FrozenTrial]:
        """Return a trial and the attempts before it, newest first."""
        chain = [self._by_number[number]]
        while REDO_OF in chain[-1].user_attrs:
            chain.append(self._by_number[chain[-1].user_attrs[REDO_OF]])
        return chain

    def slot(self, number: int) -> int:
        """Return the slot of a trial: that of the fresh trial with which its attempts began."""
        return sum(other < self.history(number)[-1].number for other in self.fresh)

    def counts(self, number: int, budget: int) -> bool:
        """Whether a trial must run: its slot is within the budget, and no earlier redo does the same work."""
        trial = self._by_number[number]
        first = REDO_OF not in trial.user_attrs or self._redos[trial.user_attrs[REDO_OF]] == number
        return SURPLUS not in trial.user_attrs and first and self.slot(number) < budget

    def finished(self, budget: int) -> list[FrozenTrial]:
        """Return the finished trials of the first `budget` slots, by slot."""
        last = [self.attempts(slot)[-1] for slot in range(min(budget, len(self.fresh)))]
        return [trial for trial in last if trial.state in FINISHED]

    def to_redo(self, budget: int) -> list[FrozenTrial]:
        """Return the failed trials that have no redo yet."""
        last = [self.attempts(slot)[-1] for slot in range(min(budget, len(self.fresh)))]
        return [trial for trial in last if trial.state == TrialState.FAIL]

    def deaths(self, number: int) -> int:
        """Count the attempts, this one included, whose worker died or crashed."""
        return sum(one.user_attrs.get(FAILURE) in (DIED, CRASHED) for one in self.history(number))

    def has_work(self, budget: int, ordered_from: int | None = None) -> bool:
        """Whether a worker that asks now gets a trial that counts: a waiting redo, or a free slot.

        Args:
            budget: number of slots.
            ordered_from: from this slot on, a slot is free only when all earlier ones are finished.
        """
        if any(one.state == TrialState.WAITING and self.counts(one.number, budget) for one in self.trials):
            return True
        taken = len(self.fresh)
        early = ordered_from is not None and taken >= ordered_from and len(self.finished(taken)) < taken
        return taken < budget and not early
