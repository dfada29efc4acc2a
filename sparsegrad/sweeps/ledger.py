"""Which trials count: N slots, each with one chain of attempts, derived from the study's trials alone.

Every worker reads the same trials and reaches the same result, so no coordinator is needed:

- A *fresh* trial takes the next slot. Its slot is the number of fresh trials with lower numbers, which never changes.
- Fresh trials beyond slot N, which appear if several workers ask at once, are *surplus*: they are not run.
- A failed trial is attempted again by a *redo* with the same values. Of several redos of a trial, the first counts that
  is not surplus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

REDO_OF, SURPLUS, FAILURE, REASON = "redo_of", "surplus", "failure", "reason"
RECORD_SECONDS = "record_seconds"  # of the whole run, of which a trial may have trained only the rest
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
            if REDO_OF in trial.user_attrs and SURPLUS not in trial.user_attrs:
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
        first = self.history(number)[-1].number
        return sum(other < first for other in self.fresh)

    def counts(self, number: int, budget: int) -> bool:
        """Whether a trial must run: its slot is within the budget, and no earlier redo does the same work."""
        trial = self._by_number[number]
        if SURPLUS in trial.user_attrs:
            return False
        first = REDO_OF not in trial.user_attrs or self._redos[trial.user_attrs[REDO_OF]] == number
        return first and self.slot(number) < budget

    def finished(self, budget: int) -> list[FrozenTrial]:
        """Return the finished trials of the first `budget` slots, by slot."""
        last = [self.attempts(slot)[-1] for slot in range(min(budget, len(self.fresh)))]
        return [trial for trial in last if trial.state in FINISHED]

    def to_redo(self, budget: int) -> list[FrozenTrial]:
        """Return the failed trials that have no redo yet."""
        last = [self.attempts(slot)[-1] for slot in range(min(budget, len(self.fresh)))]
        return [trial for trial in last if trial.state == TrialState.FAIL]

    def is_early(self, slot: int, ordered_from: int | None) -> bool:
        """Whether a slot depends on earlier ones of which one is not finished; `ordered_from` as in `has_work`."""
        return ordered_from is not None and slot >= ordered_from and len(self.finished(slot)) < slot

    def deaths(self, number: int) -> int:
        """Count the attempts, this one included, whose worker died or crashed."""
        return sum(one.user_attrs.get(FAILURE) in (DIED, CRASHED) for one in self.history(number))

    def has_work(self, budget: int, ordered_from: int | None = None) -> bool:
        """Whether a worker that asks now gets a trial that counts: a waiting redo, or a free slot.

        Args:
            budget: number of slots.
            ordered_from: from this slot on, a slot is given only when all earlier ones are finished.
        """
        waiting = [one.number for one in self.trials if one.state == TrialState.WAITING]
        redos = [self.slot(number) for number in waiting if self.counts(number, budget)]
        if not all(self.is_early(slot, ordered_from) for slot in redos):
            return True
        taken = len(self.fresh)
        return taken < budget and not self.is_early(taken, ordered_from)


def read_ledger(study: Study) -> Ledger:
    """The slots of all trials, for a sampler that is asked for values.

    `get_trials` would read the storage once more, and with the pruner Hyperband show only the trials of one bracket.
    """
    return Ledger(study._get_trials(deepcopy=False, use_cache=True))


def find_first_best(scores: Sequence[float | None]) -> int | None:
    """Index of the highest score, of equal ones the first; None without a score: how every winner is chosen."""
    scored = [(score, -index) for index, score in enumerate(scores) if score is not None]
    return -max(scored)[1] if scored else None


def find_winner(study: Study) -> FrozenTrial | None:
    """The completed trial with the best value, of equal ones that of the earliest slot; None without one.

    Optuna's `best_trial` leaves open which of equal ones it is, and a sampler would look around another one.
    """
    ledger = Ledger(study.get_trials(deepcopy=False))
    last = [ledger.attempts(slot)[-1] for slot in range(len(ledger.fresh))]
    best = find_first_best([read_score(one, study.direction) for one in last])
    return None if best is None else last[best]


def read_score(trial: FrozenTrial, direction: StudyDirection) -> float | None:
    """The value of a completed trial, such that higher is better; None of another trial."""
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return None
    return trial.value if direction == StudyDirection.MAXIMIZE else -trial.value
