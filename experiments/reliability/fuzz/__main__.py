"""Give damaged files to every reader of files, and count what happens.

    python -m experiments.reliability.fuzz --inputs 2000 --seed 0     # 2,000 inputs per reader

A damaged file that is still correct may be accepted. Any other must be refused with a `UserError`. These are defects:
another exception, more than 20 seconds, a large allocation, access outside the folder, a new process, and code run
from a file. Input `i` of a reader depends on the seed alone. The counts are written to results/reliability/fuzz.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.paths import ROOT
from experiments.reliability.fuzz import mutate
from experiments.reliability.fuzz.base import Reader
from experiments.reliability.fuzz.readers import all_readers
from sparsegrad.errors import UserError
from sparsegrad.files import write_json
from sparsegrad.runs.environment import describe_environment

SECONDS = 20  # limit for one input
# Bytes of address space that a reader may add. Enough to map an oversized file, not enough to read it as text.
ROOM = 2**31
_PROCESSES = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork")


class Guard:
    """Limits time and memory of a reader, and notices files outside its folder, processes and code run from files."""

    def __init__(self, forbidden: Path) -> None:
        self.forbidden, self.active = str(forbidden), False
        self.seen: list[str] = []
        sys.addaudithook(self._audit)  # cannot be removed: hence `active`
        signal.signal(signal.SIGALRM, self._raise_timeout)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and (event in _PROCESSES or self._is_outside(arguments)):
            self.seen.append(f"{event} {arguments[:1]}")

    def _is_outside(self, arguments: tuple[Any, ...]) -> bool:
        first = arguments[0] if arguments else None
        path = os.path.realpath(first) if isinstance(first, str) and "\0" not in first and "/" in first else ""
        return path.startswith(self.forbidden) or path == "/etc/passwd"

    def _raise_timeout(self, *_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} seconds")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Apply the limits inside the block; raise `AssertionError` at its end for anything forbidden that was seen."""
        self.seen.clear()
        size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, hard))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            if os.path.exists(f"{self.forbidden}/{mutate.PAYLOAD}"):
                os.rmdir(f"{self.forbidden}/{mutate.PAYLOAD}")
                self.seen.append("code of a file was run")
            if self.seen:
                raise AssertionError("; ".join(sorted(set(self.seen))))


def fuzz(name: str, reader: Reader, inputs: int, seed: int, place: Path, guard: Guard) -> dict[str, Any]:
    """Fuzz one reader: its counts in total and by kind of damage, and every defect."""
    good, case = place / "good", place / "case"
    shutil.rmtree(good, ignore_errors=True)
    good.mkdir()
    reader.make(good)
    with guard.watching():
        reader.read(_copy_fresh(good, case))  # undamaged, the files must be accepted
    counts: dict[str, Counter[str]] = {}
    defects = []
    for number in range(inputs):
        draw = random.Random(f"{seed} {name} {number}")
        folder = _copy_fresh(good, case)
        damage = _damage(reader, folder, draw)
        outcome, detail = _try_reading(reader, folder, guard)
        counts.setdefault(damage, Counter())[outcome] += 1
        if detail:
            defects.append({"input": number, "damage": damage, "error": detail})
    total: Counter[str] = sum(counts.values(), Counter())
    names = ("refused", "accepted", "defect")
    by_damage = {key: {one: counts[key][one] for one in names} for key in sorted(counts)}
    return {"inputs": inputs, **{one: total[one] for one in names}, "by_damage": by_damage, "defects": defects}


def _copy_fresh(good: Path, case: Path) -> Path:
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(good, case)
    return case


def _damage(reader: Reader, folder: Path, draw: random.Random) -> str:
    file = draw.choice(sorted(reader.files))
    change = draw.choice(reader.files[file])
    change(folder / file, draw)
    reader.repair(folder, draw)
    return change.__name__


def _try_reading(reader: Reader, folder: Path, guard: Guard) -> tuple[str, str]:
    """(`refused`, ""), (`accepted`, ""), or (`defect`, what happened)."""
    try:
        with guard.watching():
            reader.read(folder)
    except UserError:
        return "refused", ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "defect", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}, {last.name})"
    return "accepted", ""


def fuzz_all(inputs: int, seed: int, only: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Fuzz all readers, or those in `only`: reader -> counts."""
    logging.disable(logging.WARNING)
    found = {}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(name).resolve()
        (place / mutate.OUTSIDE).mkdir()
        (place / mutate.OUTSIDE / "secret").write_text("{}", encoding="utf-8")
        guard = Guard(place / mutate.OUTSIDE)
        for reader, parts in all_readers().items():
            if not only or reader in only:
                found[reader] = fuzz(reader, parts, inputs, seed, place, guard)
                counts = ", ".join(f"{found[reader][one]} {one}" for one in ("refused", "accepted", "defect"))
                print(f"{reader}: {counts}", flush=True)
    logging.disable(logging.NOTSET)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0 without defects, 1 with some."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m experiments.reliability.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000, help="inputs per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=list(all_readers()), default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "results/reliability/fuzz.json")
    chosen = parser.parse_args(arguments)
    found = fuzz_all(chosen.inputs, chosen.seed, chosen.readers)
    total = sum(one["inputs"] for one in found.values())
    defects = [defect for one in found.values() for defect in one["defects"]]
    for defect in defects[:40]:
        print(defect)
    facts = {"seed": chosen.seed, "inputs": total, "defects": len(defects), "readers": found}
    write_json(chosen.out, {**facts, "environment": describe_environment(torch.device("cpu"))})
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
