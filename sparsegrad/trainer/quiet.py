"""Silence the libraries, so that the screen shows progress bars and results alone."""

from __future__ import annotations

import logging
import os
import re
import warnings

from sparsegrad.distributed import is_main
from sparsegrad.progress import erase, has_terminal, is_quiet

# They log every request at INFO, with the signed addresses of the hub's files.
_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "filelock", "fsspec")


def quiet_transformers() -> None:
    """Keep `transformers`' remarks about new heads and its loading bars out of the progress display."""
    import datasets
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()  # ours show the tokenizing
    # The hub's bars, of downloads, know the bytes of a file, which ours do not. `transformers` has just disabled them.
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None and has_terminal() and not is_quiet():
        enable_progress_bars()
    hub = logging.getLogger("huggingface_hub")  # prints its warnings to stderr itself; the root logger has stdout
    hub.propagate = False
    for handler in hub.handlers:
        handler.addFilter(_hide_signatures)


def quiet_libraries() -> None:
    """Leave the screen to progress bars and results: libraries' own chatter goes, log lines clear the bar first."""
    for handler in logging.getLogger().handlers:
        if _clear_bar not in handler.filters:
            handler.addFilter(_clear_bar)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_main():
        os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("hydra").setLevel(logging.WARNING)  # of a multirun: each job prints what it changes itself
    for client in _HTTP_CLIENTS:
        logging.getLogger(client).setLevel(logging.WARNING)
    for module in ("torch", "peft", "transformers", "accelerate"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")


def _clear_bar(_: logging.LogRecord) -> bool:
    erase()
    return True


def _hide_signatures(record: logging.LogRecord) -> bool:
    """Cut what follows a `?` in an address: with the signature of the hub's storage, anyone can read the file."""
    record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?[^\s'\"]*", r"\1", record.getMessage()), ()
    return True
