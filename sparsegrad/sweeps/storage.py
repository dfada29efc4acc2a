"""Where studies live: SQLite, PostgreSQL, a journal file, or Optuna's gRPC proxy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from sparsegrad.errors import UserError, first_line
from sparsegrad.files import check_writable

JOURNAL, GRPC = "journal:", "grpc://"
_FORMS = "give a file such as studies.db, journal:FILE, postgresql://USER@HOST/DATABASE or grpc://HOST:PORT"
_SECONDS_TO_CONNECT = 10


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open storage.

    Attributes:
        shown: its address without the password.
        claiming: held while a trial is taken or given back. SQLite has no row locks, and two workers that read a trial
            as free would both take it; the other storages keep them apart themselves.
    """

    storage: BaseStorage
    shown: str
    claiming: Callable[[], AbstractContextManager[Any]]


def open_store(where: str) -> Store:
    """Open the storage that `sweep.storage` names.

    Raises:
        UserError: if it cannot be reached, is of another schema, or is no storage; a password is never shown.
    """
    if where.startswith(JOURNAL):
        return _open(lambda: _journal(Path(where.removeprefix(JOURNAL))), where)
    if where.startswith(GRPC):
        return _open(lambda: _grpc(where), where)
    url = _url(where)
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "")
        check_writable(file.parent)
        lock = FileLock(file.with_name(file.name + ".lock"))  # one object: it may be entered again while it is held
        return _open(lambda: _rdb(url, {"timeout": 60}), where, lambda: lock)
    options = {"connect_timeout": _SECONDS_TO_CONNECT} if url.get_backend_name() == "postgresql" else {}
    return _open(lambda: _rdb(url, options), where)


def shown(where: str) -> str:
    """An address as it may be shown."""
    try:
        return _url(where).render_as_string(hide_password=True) if "://" in where else where
    except UserError:
        return where.rpartition("@")[2]


def dashboard_address(where: str) -> str:
    """The same storage in the words of optuna-dashboard."""
    return where.removeprefix(JOURNAL) if where.startswith(JOURNAL) else _url(where).render_as_string(False)


def _url(where: str) -> URL:
    if "://" not in where:
        return URL.create("sqlite", database=where)
    try:
        url = make_url(where)
    except ArgumentError:
        raise UserError(f"sweep.storage={where.rpartition('@')[2]} is not understood: {_FORMS}") from None
    if url.drivername in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    return url


def _open(
    make: Callable[[], BaseStorage], where: str, claiming: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Store:
    try:
        with claiming():
            return Store(storage=_patiently(make), shown=shown(where), claiming=claiming)
    except ImportError as error:
        raise UserError(f"sweep.storage={shown(where)} needs a package: {error}; pip install it") from None
    except (SQLAlchemyError, StorageInternalError, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"sweep.storage={shown(where)} cannot be used: {_reason(error, where)}; {_FORMS}") from None


def _patiently(make: Callable[[], BaseStorage]) -> BaseStorage:
    """Workers that start together on an empty database trip over each other's tables: the loser tries again."""
    for _ in range(5):
        try:
            return make()
        except (IntegrityError, ProgrammingError):
            time.sleep(random.uniform(0.2, 1.0))
    return make()


def _reason(error: BaseException, where: str) -> str:
    """The first line of an error, or of what Optuna wrapped in it; without the password."""
    deepest = getattr(error, "orig", None) or error.__cause__ or error
    text = first_line(deepest)
    password = _url(where).password if "://" in where else None
    for secret in {str(password), quote_plus(str(password))} if password else ():
        text = text.replace(secret, "***")
    return text


def _rdb(url: URL, connect: dict[str, Any]) -> BaseStorage:
    engine = {"connect_args": connect, "pool_pre_ping": True}
    return RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=engine)


def _journal(file: Path) -> BaseStorage:
    check_writable(file.parent)
    return JournalStorage(JournalFileBackend(str(file)))


def _grpc(where: str) -> BaseStorage:
    host, _, port = where.removeprefix(GRPC).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("host and port are needed")
    storage = GrpcStorageProxy(host=host, port=int(port))
    storage.wait_server_ready(timeout=_SECONDS_TO_CONNECT)
    return storage
