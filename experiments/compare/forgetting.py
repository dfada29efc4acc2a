"""What a language model forgets: its loss on general text after training minus before.

    make forgetting TEXTS=<JSON lines with a text each> TREES=<file of conversation trees>

Measures the complete runs of compare_smollm2, and those of evidence_smollm2 that are the very same. The weights of a
run are in its adapter, which evidence_smollm2 does not save and the repository does not contain. A run without one is
trained again below the work folder, with the same key; its record in the results folder stays as it is. Each result is
a file in results/compare/forgetting, named by the key of its run; the same command continues after a stop.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.compare.general_text import mean_loss, read_texts
from experiments.compare.methods import find_method
from experiments.report.comparison.block import SHARED
from experiments.report.comparison.forgotten import FOLDER, describe_texts, read_forgetting
from experiments.report.comparison.table import write_comparison
from experiments.reproduce import commands, dry_run, making
from experiments.reproduce.cells import Cell, in_evidence, list_cells
from experiments.reproduce.commands import carried, last_wins, split_names
from experiments.reproduce.places import check_places
from experiments.reproduce.plans import read_plan
from sparsegrad.adapter import load_adapter
from sparsegrad.errors import UserError, check_integer
from sparsegrad.files import write_json
from sparsegrad.hashing import SHORT, file_sha256
from sparsegrad.models.loading import load_model, load_tokenizer
from sparsegrad.models.source import find_sources
from sparsegrad.runs.overrides import key_of
from sparsegrad.runs.records import find_complete
from sparsegrad.sweeps.make_commands import LANGUAGE_TASK, search_command
from sparsegrad.sweeps.search_results import SearchMissingError

PLAN = "compare_smollm2"
RUN_FOLDERS = (PLAN, *SHARED)  # where a run of this plan may be


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured: on which texts, for which methods (empty: the plan's), and what runs again need."""

    texts: Path
    rows: int
    tokens: int
    methods: tuple[str, ...]
    trees: str | None
    workers: int
    dry: bool
    overrides: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 if all is measured, 1 if something is left, 2 after bad input, 130 after Ctrl-C."""
    options = _parser().parse_intermixed_args(arguments)
    return commands.run(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> int:
    if not options.texts:
        raise UserError("TEXTS is missing: give TEXTS=<JSON lines, or a JSON list such as Alpaca's>")
    request = Request(
        texts=Path(options.texts),
        rows=check_integer("--rows", options.rows, at_least=1),
        tokens=check_integer("--tokens", options.tokens, at_least=2, remedy="the first token has no loss"),
        methods=tuple(dict.fromkeys(find_method(one) for one in split_names(options.methods))),
        trees=options.trees,
        workers=check_integer("WORKERS", options.workers, at_least=1),
        dry=options.dry,
        overrides=last_wins(in_evidence(options.overrides)),
    )
    check_places(trees=request.trees, dry=request.dry)
    return measure_all(request)


def measure_all(request: Request) -> int:
    """Measure every complete run that has no result, and rebuild the table; status 1 if runs are left.

    Raises:
        UserError: for a file without texts, results of other texts, or if no run is complete.
    """
    texts = read_texts(request.texts, request.rows)
    about = {"texts": file_sha256(request.texts)[:SHORT], "rows": len(texts), "tokens": request.tokens}
    cells, unfinished = _list_complete(request)
    results = Path(cells[0].config.results_dir)
    _check_same_texts(results, about)
    missing = [cell for cell in cells if not _result_path(cell).is_file()]
    print(f"{len(cells) - len(missing)} of {len(cells)} complete runs are measured", flush=True)
    lacking = [cell for cell in missing if find_adapter(cell) is None]
    again = [_repeat(cell, request.trees) for cell in lacking] if request.trees else []
    if request.dry:
        print(f"{len(lacking)} of the others have no adapter, so they are trained again (TREES=<file>)", flush=True)
        if again:
            dry_run.show(again, results / "runs")
        return 0
    failed = _measure_cells(missing, again, texts, about, request.workers) if missing else {}
    print(write_comparison(results, PLAN), flush=True)
    for label, reason in {**unfinished, **failed}.items():  # last: above the table they would be lost
        print(f"left: {label}: {reason}", flush=True)
    return 1 if unfinished or failed else 0


def _list_complete(request: Request) -> tuple[list[Cell], dict[str, str]]:
    """The cells whose run is complete; and of the others, label -> why they cannot be measured."""
    found, unfinished = list[Cell](), dict[str, str]()
    own = [one for one in request.overrides if key_of(one) == "results_dir"]
    for method in request.methods or read_plan(PLAN).grid["method"]:
        command = search_command("compare", [method], [LANGUAGE_TASK], request.trees, carried(own))
        remedy = f"not run yet; {command} runs it"
        try:
            cells = list_cells(PLAN, (*request.overrides, f"method={method}"), request.trees)
        except SearchMissingError:
            unfinished[method] = remedy
            continue
        for cell in cells:
            if any(_find_record(cell, Path(cell.config.results_dir), folder) for folder in RUN_FOLDERS):
                found.append(cell)
            else:
                unfinished[cell.label] = remedy
    if not found:
        label, reason = next(iter(unfinished.items()))
        raise UserError(f"no run can be measured: {label}: {reason}")
    return found, unfinished


def _find_record(cell: Cell, results: Path, folder: str) -> Mapping[str, Any] | None:
    return find_complete(results / "runs" / folder / f"{cell.config.key}.json")


def find_adapter(cell: Cell) -> Path | None:
    """The adapter of a complete run of this cell, made by the plan, by one that shares the run, or again here."""
    for results in (Path(cell.config.results_dir), _folder_again(cell)):
        for folder in RUN_FOLDERS:
            adapter = results / "adapters" / folder / cell.config.key
            if adapter.is_dir() and _find_record(cell, results, folder):
                return adapter
    return None


def _folder_again(cell: Cell) -> Path:
    """The results folder of runs that are trained again: the committed records stay as they are."""
    return Path(cell.config.work_dir) / "forgetting"


def _repeat(cell: Cell, trees: str | None) -> Cell:
    """The very same run in a results folder of its own, with its adapter; its rate is the one that the search gave."""
    replaced = ("results_dir", "save_adapter", "hparams", "train.lr", "data.dir")
    kept = [one for one in cell.overrides if key_of(one) not in replaced]
    own = [f"results_dir={_folder_again(cell)}", "save_adapter=sparsegrad", "hparams=null"]
    (found,) = list_cells(PLAN, [*kept, *own, f"train.lr={cell.config.train.lr}"], trees)
    assert found.config.key == cell.config.key
    return found


def _result_path(cell: Cell) -> Path:
    return Path(cell.config.results_dir) / FOLDER / f"{cell.config.key}.json"


def _measure_cells(
    cells: Sequence[Cell], again: Sequence[Cell], texts: Sequence[str], about: Mapping[str, Any], workers: int
) -> dict[str, str]:
    """Train `again` for their adapters, then measure `cells`; label -> reason of those that could not be measured."""
    config = cells[0].config
    sources = find_sources(config.model, is_language=True)
    tokenizer = load_tokenizer(config.model, sources.tokenizer)
    if not any(len(tokenizer(text).input_ids) > 1 for text in texts):
        raise UserError("TEXTS has no text of two tokens, and the first token has no loss: give longer texts")
    for one in again:
        one.config.record_path.unlink(missing_ok=True)  # else a run whose adapter was deleted counts as done
    if again:
        making.make(again, workers)
    model = load_model(config.model, config.task, tokenizer, torch.float32, sources.model)
    measure = functools.partial(mean_loss, model, tokenizer, texts, about["tokens"])
    before, failed = measure(), dict[str, str]()
    for cell in cells:
        adapter = find_adapter(cell)
        if adapter is None:
            failed[cell.label] = "its run has no adapter; TREES=<file of conversation trees> trains it again"
            continue
        try:
            after = _measure_merged(model, adapter, measure)
        except UserError as error:
            failed[cell.label] = str(error)
            continue
        result = {"before": round(before, 5), "after": round(after, 5), **about}
        trained_again = {"trained_again": True} if adapter.is_relative_to(_folder_again(cell)) else {}
        write_json(_result_path(cell), {**result, **trained_again})
        print(f"{cell.label}: {before:.4f} -> {after:.4f}", flush=True)
    return failed


def _measure_merged(model: nn.Module, adapter: Path, measure: Callable[[], float]) -> float:
    """The loss of `model` with the adapter, which is removed again; `UserError` if it does not fit or has no loss."""
    merged = load_adapter(model, adapter)
    merged.merge()
    loss = measure()
    merged.unmerge()
    if not math.isfinite(loss):
        raise UserError(f"its loss on these texts is {loss}; the run diverged, so delete its record")
    return loss


def _check_same_texts(results: Path, about: Mapping[str, Any]) -> None:
    """Refuse to add results to those of other texts: differences between methods would be differences of texts."""
    for key, one in read_forgetting(results).items():
        if describe_texts(one) != describe_texts(about):
            raise UserError(
                f"{results / FOLDER}/{key}.json was measured with {describe_texts(one)}, this call has "
                f"{describe_texts(about)}: give the same, or delete the folder to measure all runs again"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare.forgetting", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--texts", help="JSON lines or a JSON list, each entry with a text, output or response")
    parser.add_argument("--rows", type=int, default=200, help="texts from the start of the file (default: 200)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each text (default: 128)")
    parser.add_argument("--methods", help="options of conf/method, comma-separated; default: those of the plan")
    parser.add_argument("--trees", help="file of OpenAssistant conversation trees, for runs that are trained again")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time, one thread each (default: 2)")
    parser.add_argument("--dry", action="store_true", help="count what is missing without running anything")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py, for example results_dir=elsewhere")
    return parser


if __name__ == "__main__":
    sys.exit(main())
