"""Serve the PostgreSQL storage in `SPARSEGRAD_STORAGE` to many workers, by Optuna's gRPC proxy.

    SPARSEGRAD_STORAGE=postgresql://user@host/database python scripts/storage_proxy.py

Workers use `SPARSEGRAD_STORAGE=grpc://HOST:13000`. The proxy has no authentication: keep it inside the network of the
cluster.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from optuna.exceptions import ExperimentalWarning
from optuna.storages import get_storage, run_grpc_proxy_server

from sparsegrad.errors import UserError, missing_package, run_as_command
from sparsegrad.progress import say
from sparsegrad.sweeps.storage import hide_password, open_store


def serve(where: str, host: str, port: int, threads: int) -> None:
    """Serve a storage until the process is stopped.

    Raises:
        UserError: if `where` is no PostgreSQL address, or the database cannot be used.
    """
    if not where.startswith("postgres"):
        raise UserError(
            f"SPARSEGRAD_STORAGE={hide_password(where)} cannot be served: set it to the database, "
            "postgresql://USER@HOST/DATABASE"
        )
    store = open_store(where)
    say(f"serving {store.address} on {host}:{port}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # the proxy is in Optuna since 4.2
        # `get_storage` keeps finished trials in memory. Without it, each look of a worker reads all trials again.
        try:
            run_grpc_proxy_server(
                get_storage(store.storage), host=host, port=port, thread_pool=ThreadPoolExecutor(max_workers=threads)
            )
        except ImportError:
            raise missing_package("the proxy", "grpcio", "proxy") from None
        except RuntimeError as error:  # of gRPC: it cannot listen there
            raise UserError(f"{host}:{port} cannot be used ({error}): choose another --port") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="0.0.0.0", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=13000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=10, help="requests at the same time; default: %(default)s")
    chosen = parser.parse_args(arguments)
    where = os.environ.get("SPARSEGRAD_STORAGE", "")
    return run_as_command(lambda: serve(where, chosen.host, chosen.port, chosen.threads))


if __name__ == "__main__":
    sys.exit(main())
