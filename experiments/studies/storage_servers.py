"""Start a storage on this machine for one measurement: SQLite, a journal, PostgreSQL, or PostgreSQL with a proxy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from experiments.paths import ROOT
from sparsegrad.errors import UserError

_START_SECONDS = 120  # in which the proxy must listen; its imports take long on a busy machine
STORAGES = ("sqlite", "journal", "postgresql", "grpc")


@contextmanager
def serving(storage: str, folder: Path, max_connections: int) -> Iterator[tuple[str, list[psutil.Process]]]:
    """Start the servers of a storage; yields its address and the server processes."""
    if storage == "sqlite":
        yield str(folder / "studies.db"), []
    elif storage == "journal":
        yield f"journal:{folder / 'studies.log'}", []
    else:
        with postgresql(max_connections) as (where, server):
            if storage == "postgresql":
                yield where, [server]
            else:
                with proxy(where) as (address, process):
                    yield address, [server, process]


@contextmanager
def postgresql(max_connections: int) -> Iterator[tuple[str, psutil.Process]]:
    """A PostgreSQL server on loopback, deleted afterwards; its defaults, but for the number of connections."""
    binaries = _find_binaries()
    folder, port = Path(tempfile.mkdtemp(prefix="pg")), _find_port()
    options: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres")
        options["user"] = "postgres"
    data = folder / "data"
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections={max_connections}"
    control = [str(binaries / "pg_ctl"), "-D", str(data), "-w"]
    try:
        subprocess.run([str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-U", "load"], **options)
        subprocess.run([*control, "-l", str(folder / "log"), "-o", settings, "start"], **options)
        number = int((data / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        yield f"postgresql://load@127.0.0.1:{port}/postgres", psutil.Process(number)
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **{**options, "check": False})
        shutil.rmtree(folder)


def read_version() -> str:
    """Return the version of PostgreSQL, such as 15.14."""
    done = subprocess.run([str(_find_binaries() / "postgres"), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[2]


def _find_binaries() -> Path:
    """Return the folder of PostgreSQL's programs, which Debian does not put on the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        raise UserError("PostgreSQL is not installed: apt-get install postgresql")
    return found[-1].parent


@contextmanager
def proxy(where: str) -> Iterator[tuple[str, psutil.Process]]:
    """Optuna's proxy in front of a database, as scripts/storage_proxy.py starts it."""
    port = _find_port()
    command = [sys.executable, "scripts/storage_proxy.py", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "SPARSEGRAD_STORAGE": where})
    try:
        _wait_for_port(port)
        yield f"grpc://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def read_cpu(servers: Sequence[psutil.Process]) -> float:
    """Processor seconds of server processes and their children, also of those that have ended."""
    total = 0.0
    for server in servers:
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system + (times.children_user + times.children_system)
    return total


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _find_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
