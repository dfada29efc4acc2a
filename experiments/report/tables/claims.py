"""The claims ledger: what the paper claims, what its authors' logs say, and a verdict computed from results here."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import yaml

from experiments.paths import DATA
from experiments.published import SEEDS as PAPER_SEEDS
from experiments.published import TASKS, authors_runs, cells
from experiments.report.decisions import (
    CONTRADICTED,
    FINAL_SEEDS,
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    SUPPORTED,
    UNDECIDED,
    Decision,
    count_differences,
    decide,
    width,
)
from experiments.report.tables.accuracy import AVERAGE, LOGGED_SEEDS, logs
from experiments.report.tables.base import Context, Table
from sparsegrad.errors import UserError

FILE = "claims.yaml"
FIELDS = {"id", "name", "claim", "section", "cells", "published", "logs", "caveat", "decide"}
REQUIRED = FIELDS - {"cells", "published", "caveat"}
PRINTED = {task: name for name, task in TASKS.items()} | {"stsb": "STS-B", "sst2": "SST-2"}
LOGGED = {"speed": ("true_steps_per_second", "steps/s", 2), "memory": ("train_peak_mb", "MB", 0)}


@dataclass(frozen=True)
class Verdict:
    """A claim with its decisions."""

    claim: Mapping[str, Any]
    decisions: Sequence[Decision]
    others: Sequence[Decision]

    @property
    def kind(self) -> str:
        """SUPPORTED, REPRODUCED, CONTRADICTED, NOT_REPRODUCED, UNDECIDED or NOT_TESTED."""
        tested = {one.verdict for one in self.decisions} - {NOT_TESTED}
        if CONTRADICTED in tested:  # a claim says all of its parts
            # The paper measured on a GPU: a CPU neither refutes nor confirms that.
            elsewhere = all(one.place for one in self.decisions if one.verdict == CONTRADICTED)
            return NOT_REPRODUCED if elsewhere else CONTRADICTED
        if tested == {SUPPORTED}:
            return REPRODUCED if all(one.place for one in self.decisions if one.verdict == SUPPORTED) else SUPPORTED
        return UNDECIDED if tested else NOT_TESTED

    @property
    def text(self) -> str:
        """The verdict in words, with the parts and tasks that it rests on; one from few seeds is provisional."""
        words, count, holding = self.kind, len(self.decisions), self._select(SUPPORTED)
        if self.kind in (SUPPORTED, REPRODUCED) and len(holding) < count:
            words = f"{words} in {len(holding)} of {count} parts, the others are not tested"
        if self.kind == UNDECIDED:
            words = _describe_open(self._select(UNDECIDED))
        limits, of_holding = _describe_limits(self.deciding), _describe_limits(holding)
        if self.kind == UNDECIDED and holding:
            own = "" if of_holding == limits else of_holding
            words = f"supported in {len(holding)} of {count} parts{own}; in others {words}"
        return words + limits

    @property
    def deciding(self) -> Sequence[Decision]:
        """The parts that the verdict rests on; of an undecided one, those that its text shows."""
        if self.kind == UNDECIDED:
            return _shown_open(self._select(UNDECIDED))
        refuted = self.kind in (CONTRADICTED, NOT_REPRODUCED)
        return self._select(CONTRADICTED if refuted else SUPPORTED)

    @property
    def tasks(self) -> str:
        """On which tasks it was decided, in words; empty where it has none."""
        return _name_tasks(self.deciding)

    def _select(self, verdict: str) -> list[Decision]:
        return [one for one in self.decisions if one.verdict == verdict]


def _describe_limits(parts: Sequence[Decision]) -> str:
    """Tasks, places, and few seeds of the parts that a verdict rests on, to follow it."""
    seeds = [one.seeds for one in parts if one.seeds]
    is_provisional = seeds and min(seeds) < FINAL_SEEDS
    provisional = f"(provisional: {min(seeds)} of {FINAL_SEEDS} seeds)" if is_provisional else ""
    words = [_name_tasks(parts), *_list_once(one.place for one in parts), provisional]
    return "".join(f" {one}" for one in words if one)


def _name_tasks(parts: Sequence[Decision]) -> str:
    found = _list_once(task for one in parts for task in one.tasks)
    names = [PRINTED.get(task, task) for task in found]
    is_one = len(names) == 1 and found[0] in PRINTED  # one task of GLUE, of which the paper claims the average
    return f"on {', '.join(names)}{' alone' if is_one else ''}" if names else ""


def _list_once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _shown_open(parts: Sequence[Decision]) -> Sequence[Decision]:
    """Of undecided parts those that a text shows: what speaks for and against, else the widest interval."""
    if mixed := [one for one in parts if one.mixed]:
        return mixed
    found = [(width(one.interval), one) for one in parts if one.interval is not None]
    return [max(found, key=lambda pair: pair[0])[1]] if found else parts


def _describe_open(parts: Sequence[Decision]) -> str:
    """What undecided parts leave open."""
    shown = _shown_open(parts)
    if mixed := [one.mixed for one in shown if one.mixed]:
        return f"undecided ({'; '.join(mixed)})"
    if shown[0].interval is None:
        return UNDECIDED
    (low, high), only = shown[0].interval, len({one.interval for one in parts if one.interval is not None}) == 1
    digits = 3 if shown[0].unit == "in loss" else 2
    joint = f", widened for {shown[0].joint} parts," if shown[0].joint > 1 else ""
    which = "interval" if only else "widest interval"
    return f"undecided: the {which}{joint} is {low:+.{digits}f} to {high:+.{digits}f} {shown[0].unit}"


def read_claims(folder: Path = DATA) -> list[dict[str, Any]]:
    """The claims of claims.yaml.

    Raises:
        UserError: when the file cannot be read, or a claim lacks a field.
    """
    path = folder / FILE
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from the repository") from None
    for claim in found:
        missing = sorted(REQUIRED - set(claim))
        if missing or not ({"cells", "published"} & set(claim)) or set(claim) - FIELDS:
            wrong = ", ".join(missing or sorted(set(claim) - FIELDS) or ["cells or published"])
            raise UserError(f"{path}: claim {claim.get('id')} has wrong fields ({wrong}): see the head of the file")
    return list(found)


def judge(context: Context) -> list[Verdict]:
    """Every claim with its verdict; computed once for each context."""
    cache = context.store.cache
    if "claims" not in cache:
        cache["claims"] = [_judge_claim(context, claim) for claim in read_claims()]
    found: list[Verdict] = cache["claims"]
    return found


def _judge_claim(context: Context, claim: Mapping[str, Any]) -> Verdict:
    decisions: list[Decision] = []
    others: list[Decision] = []
    deciding = [spec for spec in claim["decide"] if spec.get("decides", True)]
    parts = sum(map(count_differences, deciding))
    for spec in claim["decide"]:
        is_deciding = spec in deciding
        (decisions if is_deciding else others).extend(decide(context, spec, parts if is_deciding else 1))
    return Verdict(claim, decisions, others)


def table(context: Context) -> Table:
    """One row per claim."""
    rows = [_row(one) for one in judge(context)]
    notes = [
        "A verdict is computed from the results (experiments/data/claims.yaml says how). Supported: every tested part "
        "holds, with a 95 % interval or in every repeat. Contradicted: a part is refuted in that way; for a claim of "
        "several parts with intervals that are corrected for their number (Bonferroni). Not reproduced on a CPU: every "
        "repeat refutes it, but the paper measured on a GPU. Undecided: neither; the 95 % "
        "interval is shown, if there is one. Not tested here: its runs are missing, or full fine-tuning did not reach "
        "its gate.",
        "All runs here are of small models (MiniLM, MPNet-base, SmolLM2), not the paper's; the benchmark has "
        "RoBERTa-base's shape with random weights.",
        "Provisional: from fewer than 5 seeds. Intervals are not corrected for the number of claims; those of the "
        "tables are corrected within a table.",
    ]
    return Table("claims", "The paper's claims, and what holds", pd.DataFrame(rows), notes)


def lines(context: Context) -> list[str]:
    """Three lines for the README: what holds, what does not, and what is open."""
    kinds: dict[str, list[str]] = {}
    for one in judge(context):
        # "supported in 1 of 3 parts, the others are not tested": what limits a verdict belongs to it.
        decided = one.kind in (SUPPORTED, REPRODUCED, CONTRADICTED, NOT_REPRODUCED)
        limits = one.text.removeprefix(one.kind).strip() if decided else one.tasks
        kinds.setdefault(one.kind, []).append(str(one.claim["name"]) + (f" ({limits})" if limits else ""))
    open_ones = [
        f"{heading}: {'; '.join(kinds[kind])}"
        for kind, heading in ((UNDECIDED, "undecided"), (NOT_TESTED, "not tested here"))
        if kind in kinds
    ]
    elsewhere = {kind: f" | {kind}: {'; '.join(kinds[kind])}" for kind in (REPRODUCED, NOT_REPRODUCED) if kind in kinds}
    return [
        f"Holds: {'; '.join(kinds.get(SUPPORTED, ['nothing yet']))}{elsewhere.get(REPRODUCED, '')}.",
        f"Does not hold: {'; '.join(kinds.get(CONTRADICTED, ['nothing yet']))}{elsewhere.get(NOT_REPRODUCED, '')}.",
        f"Open: {' | '.join(open_ones) or 'nothing'}.",
    ]


def _row(one: Verdict) -> dict[str, str]:
    claim = one.claim
    see = dict.fromkeys(name for decision in (*one.decisions, *one.others) for name in decision.see)
    also = [f"Also: {other.measured}" for other in one.others if other.verdict != NOT_TESTED]
    return {
        "#": str(claim["id"]),
        "claim": f"{claim['claim']} ({claim['section']})",
        "verdict": one.text,
        "measured here": "; ".join(dict.fromkeys([*(decision.measured for decision in one.decisions), *also])),
        "published": _format_published(claim),
        "authors' logs": ". ".join(filter(None, [_format_logs(claim["logs"]).rstrip("."), claim.get("caveat")])),
        "based on": ", ".join(see),
    }


def _format_published(claim: Mapping[str, Any]) -> str:
    """The printed cells with their names, or the figure in words."""
    if "cells" not in claim:
        return str(claim["published"])
    return ", ".join(f"{one['as']} {cells(one['table'])[one['row'], one['column']][0]}" for one in claim["cells"])


def _format_logs(about: str | Mapping[str, Any]) -> str:
    """What the authors' logs say, computed where they have runs."""
    if isinstance(about, str):
        return about
    measure = next(name for name in about if name != "models")
    format_one = _format_scores if measure == "score" else functools.partial(_format_logged, measure)
    return "; ".join(f"{model}: {format_one(model, about[measure])}" for model in about["models"])


def _format_scores(model: str, methods: Sequence[str]) -> str:
    """Averages over the tasks that the logs have of all these methods, with all logged seeds and with the paper's."""
    tasks = [task for task in TASKS.values() if all(logs(model, method, task, (), LOGGED_SEEDS) for method in methods)]
    shown = []
    for seeds in (LOGGED_SEEDS, PAPER_SEEDS):
        found = zip(methods, [logs(model, method, AVERAGE, tasks, seeds) for method in methods], strict=True)
        scores = ", ".join(f"{method} {one.mean:.1f}" for method, one in found if one)
        shown.append(f"{scores} ({len(seeds)} seeds)")
    return " or ".join(shown) + (f" over {len(tasks)} tasks" if len(tasks) < len(TASKS) else "")


def _format_logged(measure: str, model: str, methods: Sequence[str]) -> str:
    """Means of a column of the logs over the tasks that all methods have at one batch size: tasks differ in cost."""
    column, unit, digits = LOGGED[measure]
    means = {}
    for method in methods:
        runs = pd.concat([authors_runs(model, method, task) for task in TASKS.values()]).dropna(subset=[column])
        means[method] = runs.groupby(["batch_size", "task"])[column].mean()
    size, tasks = _find_common(means.values())
    shown = [f"{method} {mean(one[size, task] for task in tasks):.{digits}f} {unit}" for method, one in means.items()]
    return f"{', '.join(shown)} (batch size {size:g}; {', '.join(tasks)})"


def _find_common(means: Iterable[pd.Series[float]]) -> tuple[float, list[str]]:
    """The batch size at which all of these means, by batch size and task, have most tasks in common, and the tasks."""
    common = set.intersection(*(set(one.index) for one in means))
    tasks = {size: sorted(task for other, task in common if other == size) for size, _ in sorted(common)}
    return max(tasks.items(), key=lambda item: len(item[1]))
