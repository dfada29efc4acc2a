"""The results of a study: numbers, a table of its trials, and plots."""

from __future__ import annotations

import csv
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sparsegrad.errors import UserError, missing_package
from sparsegrad.files import write_json, write_text
from sparsegrad.sweeps.ledger import FINISHED, REASON, RECORD_SECONDS, SURPLUS, find_winner
from sparsegrad.sweeps.plots import PLOTS, draw_html, draw_png
from sparsegrad.sweeps.reporter import PROGRESS
from sparsegrad.sweeps.search_results import select_conditions, select_settings
from sparsegrad.sweeps.study import CONTENT, IDENTITY, LABELS

_PLOT_PACKAGES = ("matplotlib", "plotly")


def summary(study: Study) -> dict[str, Any]:
    """Return the numbers of a study as a dictionary for JSON.

    Raises:
        UserError: if no trial is complete.
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if SURPLUS not in trial.user_attrs]
    states = [trial.state for trial in trials]
    best = find_winner(study)
    if best is None:
        raise UserError(f"study {study.study_name} has no completed trial yet: run its sweep first")
    seconds, saved = _measure_seconds(trials)
    identity = study.user_attrs.get(IDENTITY, {})
    fixed = identity.get("fixed", {})
    return {
        "study": study.study_name,
        "labels": study.user_attrs.get(LABELS, {}),
        "metric": identity.get("metric"),
        "objective": identity.get("objective"),
        "budget": identity.get("budget"),
        "sampler": identity.get("sampler"),
        "pruner": identity.get("pruner"),
        "space": identity.get("space"),
        "direction": identity.get("direction"),
        "train_rest": fixed.get("train.train_rest"),
        "seed": fixed.get("seed"),
        "method": select_settings(fixed) or None,
        **select_conditions(fixed),
        "content": study.user_attrs.get(CONTENT, {}),
        "best": {"trial": best.number, "value": best.value, "values": best.params},
        "at_edge": _is_at_edge(best, trials) if "budget" in identity else None,
        "trials": {state.name.lower(): states.count(state) for state in TrialState},
        "attempts_of_dead_workers": sum(trial.state == TrialState.FAIL for trial in trials),
        "seconds": round(seconds, 1),
        "seconds_saved_by_pruning": round(saved, 1),
        "reasons": {str(trial.number): trial.user_attrs[REASON] for trial in trials if REASON in trial.user_attrs},
    }


def _is_at_edge(best: FrozenTrial, trials: list[FrozenTrial]) -> bool:
    """Whether the best value of an adaptive grid is the smallest or largest tried: a better one may be beyond."""
    ((key, value),) = best.params.items()
    tried = [one.params[key] for one in trials if key in one.params]
    return value in (min(tried), max(tried))


def _measure_seconds(trials: list[FrozenTrial]) -> tuple[float, float]:
    """Return the time of the finished trials, and the time that pruning saved, estimated at each trial's own speed."""
    spent = saved = 0.0
    for trial in trials:
        seconds = _find_seconds(trial)
        if trial.state not in FINISHED or seconds is None:
            continue
        spent += seconds
        step, total = trial.user_attrs.get(PROGRESS, (0, 0))  # steps done, steps planned
        if trial.state == TrialState.PRUNED and step:
            saved += seconds * (total / step - 1)
    return spent, saved


def _find_seconds(trial: FrozenTrial) -> float | None:
    """The time of a trial, or that of its run where it continued or found one; None while it runs."""
    if trial.duration is None:
        return None
    return max(trial.duration.total_seconds(), float(trial.user_attrs.get(RECORD_SECONDS, 0.0)))


def export(study: Study, folder: Path) -> dict[str, Any]:
    """Write `trials.csv` and `summary.json` of a study, all that `hparams=search` and tables need of it; the summary.

    Raises:
        UserError: if no trial is complete.
    """
    figures = summary(study)
    write_trials(study, folder / "trials.csv")
    write_json(folder / "summary.json", figures)
    return figures


def write_trials(study: Study, path: Path) -> None:
    """Write all trials as CSV: number, state, value, seconds, evaluations, parameters, reason."""
    trials = study.get_trials(deepcopy=False)
    keys = sorted({key for trial in trials for key in trial.params})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "state", "value", "seconds", "evaluations", *keys, "reason"])
    writer.writerows(_make_row(trial, keys) for trial in trials)
    write_text(path, file.getvalue())


def _make_row(trial: FrozenTrial, keys: list[str]) -> list[Any]:
    seconds = _find_seconds(trial)
    values = [trial.params.get(key, "") for key in keys]
    return [
        trial.number,
        trial.state.name.lower(),
        trial.value,
        "" if seconds is None else round(seconds, 2),
        len(trial.intermediate_values),
        *values,
        trial.user_attrs.get(REASON, ""),
    ]


def write_plots(study: Study, folder: Path) -> Iterator[Path]:
    """Draw each plot as PNG and HTML, and yield each file; a plot that needs more trials is left out.

    Raises:
        UserError: if matplotlib or plotly is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _silence_plots()
    for name in PLOTS:
        for suffix, draw in (("png", draw_png), ("html", draw_html)):
            path = folder / f"{name}.{suffix}"
            if _draw_plot(draw, study, name, path):
                yield path


def check_plot_packages() -> None:
    """Raise the `UserError` of `write_plots` for a missing package before there is a study."""
    for package in _PLOT_PACKAGES:
        if find_spec(package) is None:
            raise missing_package("drawing plots", package, "sweep")


def _silence_plots() -> None:
    import matplotlib

    matplotlib.use("Agg")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings(
        "ignore", "Attempting to set identical"
    )  # warned if all trials have the same value of a key
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _draw_plot(draw: Callable[[Study, str, Path], None], study: Study, name: str, path: Path) -> bool:
    """Draw one plot; False if it needs more trials."""
    try:
        draw(study, name, path)
    except ImportError as error:
        raise missing_package("drawing plots", error.name, "sweep") from None
    except (ValueError, RuntimeError):
        return False  # importance needs two completed trials that differ
    return True
