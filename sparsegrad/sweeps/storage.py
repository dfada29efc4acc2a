"""The storage of studies: SQLite, PostgreSQL, a journal file, or Optuna's gRPC proxy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote_plus

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from sparsegrad.errors import UserError, first_line, missing_package
from sparsegrad.files import check_writable

FIRST_SWEEP = "run a sweep first, for example python run.py sweep=quick method=lora"
JOURNAL, GRPC = "journal:", "grpc://"
_FORMS = "give a file such as studies.db, journal:FILE, postgresql://USER@HOST/DATABASE or grpc://HOST:PORT"
_CONNECT_SECONDS = 10
SECRET = "***"  # in the place of a password
_SECRETS = ("password", "sslpassword")  # parts of an address's query that psycopg reads

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open storage.

    Attributes:
        address: where it is, without the password.
        claiming: a lock, held while a trial is taken or returned. SQLite has no row locks, so two workers could take
            the same trial; the other storages prevent that themselves.
    """

    storage: BaseStorage
    address: str
    claiming: Callable[[], AbstractContextManager[Any]]


def open_store(where: str) -> Store:
    """Open the storage that `sweep.storage` names.

    Raises:
        UserError: if it is no storage, cannot be reached, or has another schema; the message contains no password.
    """
    if where.startswith(JOURNAL):
        return _connect(lambda: _make_journal(Path(where.removeprefix(JOURNAL))), where)
    if where.startswith(GRPC):
        return _connect(lambda: _make_proxy(where), where)
    url = _parse_url(where)
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "")
        check_writable(file.parent)
        lock = FileLock(file.with_name(file.name + ".lock"))  # one object, so that it is reentrant
        return _connect(lambda: _make_database(url, {"timeout": 60}), where, lambda: lock)
    options = {"connect_timeout": _CONNECT_SECONDS} if url.get_backend_name() == "postgresql" else {}
    return _connect(lambda: _make_database(url, options), where)


def open_existing_store(where: str) -> Store:
    """Open a storage to read it, without creating its file.

    Raises:
        UserError: if there is none yet, or as `open_store`.
    """
    file = find_file(where)
    if file is not None and not file.is_file():
        raise UserError(
            f"there is no study yet: {file} does not exist; {FIRST_SWEEP}; if it is elsewhere, set SPARSEGRAD_STORAGE "
            "to its sweep.storage"
        )
    return open_store(where)


def find_file(where: str) -> Path | None:
    """The file of a storage that is one; None for a server."""
    if where.startswith(JOURNAL) or "://" not in where:
        return Path(where.removeprefix(JOURNAL))
    if not where.startswith("sqlite"):
        return None
    return Path(_parse_url(where).database or "")


def is_unavailable(error: BaseException) -> bool:
    """Whether an error means that the storage cannot be reached; the proxy's client lets those of gRPC through."""
    return isinstance(error, StorageInternalError) or type(error).__module__.partition(".")[0] == "grpc"


def patiently(do: Callable[[], Result], seconds: float) -> Result:
    """Call `do`, again and again for `seconds` while the storage is unavailable, as while its server restarts.

    Args:
        do: reads, or writes what may be written twice.
        seconds: after which the error is raised.
    """
    end, pause = time.monotonic() + seconds, min(1.0, seconds / 4)
    while True:
        try:
            return do()
        except Exception as error:
            if not is_unavailable(error) or time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause *= 1.5


def unavailable(error: Exception, where: str) -> UserError:
    """The error for a storage that was open and cannot be reached any more."""
    return UserError(
        f"the storage {hide_password(where)} is no longer available ({_find_reason(error, where)}): run the same "
        "command to continue"
    )


def hide_password(where: str) -> str:
    """Return the address without the password, which may be a part of the query, too."""
    if "://" not in where:
        return where
    try:
        url = _parse_url(where)
    except UserError:
        return where.rpartition("@")[2]
    hidden = {name: SECRET for name in _SECRETS if name in url.query}
    # Brackets of the URL's own quoting: three stars stay readable.
    return url.update_query_dict(hidden).render_as_string(hide_password=True).replace("%2A", "*")


def dashboard_address(where: str) -> str:
    """Return the address in the form that optuna-dashboard accepts, password included."""
    return where.removeprefix(JOURNAL) if where.startswith(JOURNAL) else _parse_url(where).render_as_string(False)


def _parse_url(where: str) -> URL:
    if "://" not in where:
        return URL.create("sqlite", database=where)
    try:
        url = make_url(where)
    except ArgumentError:
        raise UserError(f"sweep.storage={where.rpartition('@')[2]} is not understood: {_FORMS}") from None
    if url.drivername in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    return url


def _connect(
    make: Callable[[], BaseStorage], where: str, claiming: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Store:
    try:
        with claiming():
            return Store(storage=_retry_on_conflict(make), address=hide_password(where), claiming=claiming)
    except ImportError as error:
        if error.name == "psycopg":
            raise missing_package(f"sweep.storage={hide_password(where)}", error.name, "sweep") from None
        if where.startswith(GRPC):
            raise missing_package(f"sweep.storage={where}", "grpcio", "proxy") from None
        raise UserError(
            f"sweep.storage={hide_password(where)} needs a package ({error}): install it with pip, or {_FORMS}"
        ) from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"sweep.storage={hide_password(where)} cannot be used: {_find_reason(error, where)}; {_FORMS}"
        ) from None


def _retry_on_conflict(make: Callable[[], BaseStorage]) -> BaseStorage:
    """Call `make` again after a conflict: workers that start together on an empty database create the same tables."""
    for _ in range(5):
        try:
            return make()
        except (IntegrityError, ProgrammingError):
            time.sleep(random.uniform(0.2, 1.0))
    return make()


def _find_reason(error: BaseException, where: str) -> str:
    """Return the first line of the original error, which Optuna may have wrapped, without the password."""
    cause = error.__cause__ or error
    text = first_line(getattr(error, "orig", None) or getattr(cause, "orig", None) or cause)
    if callable(details := getattr(error, "details", None)):  # of gRPC
        text = str(details())
    url = _parse_url(where) if "://" in where else None
    secrets = {str(secret) for secret in (url.password, *map(url.query.get, _SECRETS)) if secret} if url else set()
    # URLs contain the password quoted, drivers print it plain.
    for secret in secrets | set(map(quote_plus, secrets)):
        text = text.replace(secret, SECRET)
    return text


def _make_database(url: URL, connect: dict[str, Any]) -> BaseStorage:
    engine = {"connect_args": connect, "pool_pre_ping": True}
    return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine)


def _make_journal(file: Path) -> BaseStorage:
    check_writable(file.parent)
    return JournalStorage(JournalFileBackend(str(file)))


def _make_proxy(where: str) -> BaseStorage:
    host, _, port = where.removeprefix(GRPC).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("host and port are needed")  # becomes a UserError in `_connect`
    storage = GrpcStorageProxy(host=host, port=int(port))
    storage.wait_server_ready(timeout=_CONNECT_SECONDS)
    return storage
