"""A Python that starts at once: its processes are forks of one that has imported torch, transformers, Hydra and Optuna.

`quick_python()` is the path of a program to start in place of `sys.executable`; it runs a script, `-m MODULE` or
`-c CODE`, with the arguments, folder, environment, open files, signals and exit status that Python would have. A
process costs half a second rather than six. A test needs the real Python where it depends on the environment at the
time of an import (HF_HOME, HF_ENDPOINT), on what is imported, on a terminal, or on SIGSTOP.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = ("torch", "transformers", "peft", "hydra", "optuna", "sparsegrad.cli", "sparsegrad.runs.runner")
# The program: it hands its files to the server, and lives as long as the fork. Nothing that takes time is imported.
_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
while words and words[0][:2] in ("-u", "-B", "-W"):  # multiprocessing repeats those of its own process
    del words[0]
if not words or not (words[0] in ("-m", "-c") or words[0].endswith(".py")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
files = [int(name) for name in os.listdir("/proc/self/fd")]
files = [number for number in files if os.path.exists(f"/proc/self/fd/{{number}}")]  # not the list's own
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
request = json.dumps([words, os.getcwd(), dict(os.environ), files, sys.argv[0]]).encode()
socket.send_fds(link, [len(request).to_bytes(8, "big")], files)
link.sendall(request)
process = int(link.recv(20))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(process, number))
status = int(link.recv(20) or -9)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -9 else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@cache
def quick_python() -> str:
    """The path of the program, which multiprocessing here uses from now on too.

    The first call starts the server, which has an empty cache of the hub. The server ends with this process. Elsewhere
    than on Linux, which can pass on open files and watch a process, it is Python itself.
    """
    from run_fixtures import environment

    if sys.platform != "linux":
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="quick"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, address = folder / "python", folder / "socket"
    program.write_text(_PROGRAM.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    started = {name: value for name, value in environment(HF_HOME=str(folder)).items() if name != "PYTHONPATH"}
    server = subprocess.Popen([sys.executable, __file__, address], env=started, stdin=subprocess.PIPE)
    while not address.exists():
        assert server.poll() is None, "the server of the quick Python has ended"
        time.sleep(0.02)
    multiprocessing.set_executable(str(program))
    return str(program)


def serve(address: str) -> None:
    """Import all, then fork for every request, until stdin is closed."""
    sys.path[0] = str(Path(__file__).parents[2])  # its imports are of the checkout
    gc.disable()  # during imports it takes a sixth of their time
    for name in IMPORTED:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the tests, which end this process
    signal.signal(signal.SIGCHLD, _reap)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)  # it is there once it answers
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(link)
        link.close()


def _reap(*_: Any) -> None:
    """Take the status of children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(link: socket.socket) -> NoReturn:
    """Fork the process that is asked for, tell the program its number and its status, and kill it with the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, received, *_ = socket.recv_fds(link, 8, 200)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += link.recv(1 << 20)
    words, folder, environment, numbers, program = json.loads(content)
    process = os.fork()
    if process == 0:
        link.close()
        os.setsid()
        _place(received, numbers)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _run(words, program)
    for number in received:
        os.close(number)
    ended = os.pidfd_open(process)
    with suppress(BrokenPipeError):
        link.sendall(str(process).encode())
    if ended not in select.select([link, ended], [], [])[0]:
        os.kill(process, signal.SIGKILL)  # as the program was
        with suppress(ProcessLookupError):  # before it had a group
            os.killpg(process, signal.SIGKILL)  # what it had started, which belongs to another group than the program
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with suppress(BrokenPipeError):
        link.sendall(str(status).encode())
    os._exit(0)


def _place(received: list[int], numbers: list[int]) -> None:
    """Give the received files the numbers that they had in the program."""
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 300) for number in received]
    for number in received:
        os.close(number)
    for number, target in zip(high, numbers, strict=True):
        os.dup2(number, target)
        os.close(number)


def _run(words: list[str], program: str) -> NoReturn:
    """What Python does with these words, and its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Those of the server belong to its own files, which may have been seekable.
    text: dict[str, Any] = {"encoding": os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")[0], "closefd": False}
    sys.stdin = sys.__stdin__ = os.fdopen(0, **text)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", **text)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", **text)
    sys.executable = program
    multiprocessing.set_executable(program)
    kind, rest = (words[0], words[1:]) if words[0] in ("-m", "-c") else ("", words)
    sys.argv = [kind or rest[0], *rest[1:]]
    first = os.path.dirname(os.path.abspath(rest[0])) if not kind else os.getcwd() if kind == "-m" else ""
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    importlib.invalidate_caches()
    status = _status_of(lambda: _execute(kind, rest[0]))
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _execute(kind: str, what: str) -> None:
    if kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


def _status_of(do: Callable[[], None]) -> int:
    try:
        do()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return (left.code or 0) & 255
        print(left.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
