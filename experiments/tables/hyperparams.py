"""Tables 13-15: best batch size and learning rate per task; the rows are those of `make sweep-table`."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from experiments.tables.base import Context, Table
from sparsegrad.sweeps.storage import open_store
from sparsegrad.sweeps.table import HEADER, rows


def tables(context: Context) -> list[Table]:
    """One table per printed one, and one for the searches of anything else."""
    storage = context.results / "studies" / "studies.db"
    lines = rows(open_store(str(storage)) if storage.is_file() else None)
    found = [_table(number, [line[1:] for line in lines if line[0] == str(number)]) for number in (13, 14, 15)]
    return [*found, _summaries(context.results)]


def _table(number: int, lines: list[list[str]]) -> Table:
    title = f"Table {number}: batch size / learning rate, {lines[0][0]}, {lines[0][1]}"
    notes = ["Captions as the authors' runs show them: Table 14 is BERT, Table 15 RoBERTa-base, both full fine-tuning."]
    return Table(f"table{number}", title, pd.DataFrame(lines, columns=list(HEADER[1:])), notes)


def _summaries(results: Path) -> Table:
    """The searches whose summaries are committed; they are of other models than the paper's."""
    names = ["study", "batch size / learning rate", "score", "objective", "trials complete", "pruned"]
    lines = []
    for path in sorted((results / "studies").glob("*/summary.json")):
        found = json.loads(path.read_text())
        best, trials = found["best"], found["trials"]
        pair = f"{best['values'].get('train.batch_size', '')} / {best['values'].get('train.lr', float('nan')):.2e}"
        score = f"{best['value']:.4f} {found['metric']}"
        lines.append([found["study"], pair, score, found["objective"], str(trials["complete"]), str(trials["pruned"])])
    frame = pd.DataFrame(lines, columns=names)
    return Table("table13_mini", "Tables 13 to 15 in small: our searches (mini: not the paper's model)", frame)
