"""Whether the data that a command names is there, before anything runs; and run.py's errors in the words of `make`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sparsegrad.errors import UserError
from sparsegrad.sweeps.make_commands import LANGUAGE_TASK
from sparsegrad.tasks.glue_files import OFFICIAL, explain_task_folder

_OTHER_TASK = re.compile(r", or (use )?task=\w+( data\.dir=null)?(, which needs no hub)?")


def check_places(data: str | None = None, trees: str | None = None, *, dry: bool) -> None:
    """Refuse a file or folder that does not exist; a listing reads none, so it only says so.

    Raises:
        UserError: naming the value and what to give, unless `dry`.
    """
    given = {"DATA": (data, "the folder with GLUE"), "TREES": (trees, "the file of conversation trees")}
    absent = {name: one for name, one in given.items() if one[0] and not Path(one[0]).expanduser().exists()}
    refuse((f"{name}={place} does not exist: give {what}" for name, (place, what) in absent.items()), dry=dry)


def find_lack(task: str, data: str | None) -> str:
    """Why a folder cannot have a GLUE task: it has no folder of it. Whether its files are complete, its run tells."""
    if data is None or task not in OFFICIAL or not (root := Path(data).expanduser()).is_dir():
        return ""
    folders = [root / one for one in (task, OFFICIAL[task].folder)]
    if any(one.is_dir() for one in folders):
        return ""
    if reason := explain_task_folder("DATA", data):
        return reason
    return f"DATA={data} has no {task}: put its files into {' or '.join(map(str, folders))}"


def refuse(reasons: Iterable[str], *, dry: bool) -> None:
    """Raise the first reason that is not empty; a listing prints each of them once.

    Raises:
        UserError: unless `dry`.
    """
    for reason in dict.fromkeys(filter(None, reasons)):
        if not dry:
            raise UserError(reason)
        print(f"{reason}; the runs themselves would be refused", file=sys.stderr)


def name_of_place(task: str) -> str:
    """What `data.dir` of a run is called in its `make` command."""
    return "TREES" if task == LANGUAGE_TASK else "DATA"


def in_words_of_make(message: str, place: str) -> str:
    """An error of run.py as a user of `make` needs it, who gives `place` (DATA or TREES) instead of `data.dir`.

    What run.py offers beside the data, another task, would be another table.
    """
    message = _OTHER_TASK.sub("", message).replace("with data.dir=null", f"without {place}")
    return message.replace(", or null for", f", or no {place} for").replace("data.dir=", f"{place}=")
