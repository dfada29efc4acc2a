"""Make a table and the runs that it lacks: `python -m experiments.reproduce table5 --scale mini --data <glue folder>`.

The cells of a table come from conf/experiment. Cells with a complete record are skipped, so the same command continues
an interrupted one. Several processes can share the work: cells that another process is running are checked again at
the end. A failed cell does not stop the others; it is reported with its reason, and the next call retries it. The table
is written to the results folder that has the runs, also if some of them failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.paths import ROOT, SCALES
from experiments.report.blocks import BLOCKS
from experiments.report.command import write_report
from experiments.reproduce import benchmarks, commands, evidence, making, search_all, searches
from experiments.reproduce.cells import (
    ELSEWHERE,
    EXPERIMENTS,
    MEASURED,
    OF_TREES,
    Cell,
    experiments_of,
    in_evidence,
)
from experiments.reproduce.counting import Watch, mark_uncounted
from experiments.reproduce.dry_run import show
from experiments.reproduce.places import check_places
from experiments.reproduce.plans import read_plan
from experiments.reproduce.processes import run_to_its_end
from experiments.reproduce.search import Search
from experiments.studies import gradients as measure
from sparsegrad.errors import UserError, check_choice
from sparsegrad.files import load_json, unreadable

LAUNCHERS = ("local", "joblib", "slurm", "ray")
FIGURE_KEYS = ("block", "step", "steps")  # options of figures 2 and 3 and the basis study, such as block=2 step=40
FOR_EVERY_FIGURE = ("results_dir=", "work_dir=", "force=", *(f"{key}=" for key in FIGURE_KEYS))
FOR_EVERY_SWEEP = ("results_dir=", "work_dir=", "sweep.")  # overrides that `all` also passes to sweeps


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all cells are complete, 1 if some failed, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return commands.run(lambda: _make_table(options), options.overrides)


def _make_table(options: argparse.Namespace) -> int:
    check_choice("LAUNCHER", options.launcher, LAUNCHERS)
    options.overrides = in_evidence(options.overrides)
    names = experiments_of(options.table, options.scale)
    _check_used(options, names)
    check_places(options.data, options.trees, dry=options.dry)
    of_runs = [one for one in options.overrides if one.partition("=")[0] not in FIGURE_KEYS]
    groups = [evidence.plan_cells(name, of_runs, _place_of(name, options), dry=options.dry) for name in names]
    if reason := _explain_no_runs(options.table, options.scale):
        print(f"{options.table}: {reason}", flush=True)
    studies = _plan_studies(options)  # composed and checked before anything runs
    measured = [_measure(name, options, has_runs=bool(names)) for name in MEASURED.get(options.table, ())]
    measured += [_benchmark(preset, options) for preset in benchmarks.PRESETS.get(options.table, ())]
    made = [_group(cells, options) for cells in groups]
    given = {"dry": options.dry, "launcher": options.launcher}
    made += [search_all.make(found, workers=1, **given, threads=None, plots=True) for found in studies]
    status = max([0, *measured, *made])
    # A measurement that was refused has written nothing new to show, unless the table has other parts.
    if not options.dry and (made or status <= 1):
        _show_table(options, is_complete=not status)
    return status


def _show_table(options: argparse.Namespace, *, is_complete: bool) -> None:
    """Write and print the table from the folder of its runs."""
    write_report(options.table, options.scale, _results(options))
    if not is_complete:
        print("not complete: what failed or is left stands above the tables", file=sys.stderr)


def _check_used(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse options that would change nothing, so that nobody waits for runs that do not follow them.

    Those that the environment gives, for other tables, are left out instead.

    Raises:
        UserError: naming the option.
    """
    table = options.table
    reads_trees = any(name in OF_TREES for name in names)
    reads_glue = table in searches.TABLES or table in MEASURED or any(name not in OF_TREES for name in names)
    if options.trees and not reads_trees:
        _leave_out(options, "trees", None, f"{table} at SCALE={options.scale} reads no conversations: leave out TREES")
    if options.data and not reads_glue and (options.trees or not reads_trees):
        _leave_out(options, "data", None, f"{table} does not read GLUE: leave out DATA")
    if options.launcher != "local" and not names and table not in searches.TABLES:
        reason = f"{table} has nothing that LAUNCHER={options.launcher} could start: leave it out"
        _leave_out(options, "launcher", "local", reason)


def _leave_out(options: argparse.Namespace, name: str, value: str | None, reason: str) -> None:
    """Set an option as if it were not given, or refuse it with `reason` if the command line gives it."""
    if name.upper() not in commands.split_names(options.inherited):
        raise UserError(reason)
    setattr(options, name, value)


def _place_of(experiment: str, options: argparse.Namespace) -> str | None:
    """The data of an experiment. Table 6 alone, which reads conversations only, takes them as DATA, too."""
    data: str | None = options.data
    if experiment not in OF_TREES:
        return data
    return options.trees or (data if options.table == "table6" else None)


def _explain_no_runs(table: str, scale: str) -> str:
    """Why a table has no runs at this scale; empty if it has."""
    if table in EXPERIMENTS["mini"] and not experiments_of(table, scale) and table not in ELSEWHERE:
        return "its runs use the small model only: SCALE=mini makes them"
    return ELSEWHERE.get(table, "")


def _group(cells: list[Cell], options: argparse.Namespace) -> int:
    experiment = cells[0].experiment
    # A launcher runs the smallest grid around its cells: with force, it would repeat those between them, too.
    is_judged = experiment in BLOCKS and options.launcher == "local"
    cells = mark_uncounted(cells, read_plan(experiment) if is_judged else None)
    if options.dry:
        show(cells)
        return 0
    if options.launcher == "local":
        return making.make(cells, workers=1, threads=None)
    return _launch(cells, options.launcher)


def _benchmark(preset: str, options: argparse.Namespace) -> int:
    """Measure speed and memory on this machine, without a launcher."""
    others = [one for one in options.overrides if not one.startswith("results_dir=")]
    if others and options.table != "all":
        raise UserError(
            f"{options.table} takes no {others[0]}: it is one preset of the benchmark; for settings of your own: "
            "python -m experiments.bench --help"
        )
    return benchmarks.make(preset, _results(options), dry=options.dry)


def _plan_studies(options: argparse.Namespace) -> list[list[Search]]:
    """The sweeps of Tables 13-15 that are asked for."""
    tables = list(searches.TABLES) if options.table == "all" else [options.table]
    wanted = [name for name in tables if name in searches.TABLES]
    given = [one for one in options.overrides if options.table != "all" or one.startswith(FOR_EVERY_SWEEP)]
    return [searches.planned_searches(name, options.scale, options.data, given) for name in wanted]


def _measure(name: str, options: argparse.Namespace, *, has_runs: bool) -> int:
    """Measure a figure's data unless it exists with the requested settings."""
    path = _results(options) / "figures" / f"{name}.json"
    # Where a table has runs too, the other overrides are theirs: those of several seeds or methods mean nothing here.
    given = [one for one in options.overrides if not has_runs or one.startswith(FOR_EVERY_FIGURE)]
    flags = [f"--{one}" for one in given if one.partition("=")[0] in FIGURE_KEYS]
    rest = [one for one in given if one.partition("=")[0] not in FIGURE_KEYS]
    arguments = [name, *flags, *(["--data", options.data] if options.data else []), *rest]
    if "force=true" in rest:
        reason = "is to be replaced (force=true)"
    else:
        reason = _find_other_setting(path, flags, arguments) if path.is_file() else "is missing"
    print(f"{name}: {path} " + (f"{reason}: takes a few minutes on one core" if reason else "exists"), flush=True)
    return measure.main(arguments) if reason and not options.dry else 0


def _find_other_setting(path: Path, flags: Sequence[str], arguments: Sequence[str]) -> str:
    """How the stored data differs from what is requested, in words; empty if it does not."""
    wanted = measure.read_settings(arguments)
    if not any(one.startswith("task=") for one in arguments):
        wanted.pop("task")  # the task is SST-2 with data and the snippets without: what was measured on either will do
    try:
        found = load_json(path)
        different = [key for key in wanted if found.get(key, wanted[key]) != wanted[key]]
        # The number of steps is not stored, nor the block by some measurements: giving them measures anew.
        different += [key for key in FIGURE_KEYS if key not in found and any(f"--{key}=" in one for one in flags)]
    except OSError as error:  # temporary, perhaps: what was measured is not replaced
        raise unreadable(path, error) from error
    except (ValueError, AttributeError, TypeError):
        return "is damaged"
    if not different:
        return ""
    key = different[0]
    return f"has {key}={found[key]}, not {wanted[key]}" if key in found else f"does not say its {key}"


def _results(options: argparse.Namespace) -> Path:
    places = [one.partition("=")[2] for one in options.overrides if one.startswith("results_dir=")]
    return Path(*places[-1:] or ["results"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("table", help="table1 to table15, ablation, basis, quality, figure1 to figure3, section8, all")
    parser.add_argument("--scale", default="paper", help=", ".join(SCALES))
    parser.add_argument("--data", help="folder with GLUE (default: download from the hub)")
    parser.add_argument("--trees", help="file of OpenAssistant conversation trees, for Table 6 (default: as for GLUE)")
    parser.add_argument("--launcher", default="local", help=", ".join(LAUNCHERS))
    parser.add_argument(
        "--inherited", help="of DATA, TREES and LAUNCHER those that are ignored where they are not used"
    )
    parser.add_argument("--dry", action="store_true", help="list the cells and their cost without running anything")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example seed=42 method=full,lora")
    return parser


def _launch(cells: Sequence[Cell], launcher: str) -> int:
    watch = Watch(cells)
    missing = [cell for cell in cells if not watch.is_made(cell)]
    # One multirun has one `data.dir`, so cells with and without a data folder are launched apart.
    for group in ([cell for cell in missing if cell.takes_data is data] for data in (True, False)):
        if group:
            run_to_its_end(_multirun(group, launcher))
    failed = {cell.label: making.read_reason(cell) for cell in missing if not watch.is_made(cell)}
    complete, done = sum(map(watch.is_made, cells)), len(missing) - len(failed)
    return making.Outcome(complete=complete, planned=len(cells), done=done, failed=failed).report()


def _multirun(cells: Sequence[Cell], launcher: str) -> list[str]:
    """One Hydra multirun over the smallest grid that contains `cells`; run.py skips complete cells."""
    axes: dict[str, list[str]] = {}
    for cell in cells:
        for key, value in cell.point.items():
            axes.setdefault(key, [])
            axes[key] += [] if value in axes[key] else [value]
    rest = [one for one in cells[0].overrides if one.partition("=")[0] not in axes]
    grid = [f"{key}={','.join(values)}" for key, values in axes.items()]
    command = [sys.executable, str(ROOT / "run.py"), "-m", f"experiment={cells[0].experiment}"]
    return [*command, *grid, *rest, f"hydra/launcher={launcher}"]


if __name__ == "__main__":
    sys.exit(main())
