"""Silence the libraries, so that the screen shows progress bars and results alone."""

from __future__ import annotations

import logging
import os
import warnings

from sparsegrad.distributed import is_main


def quiet_transformers() -> None:
    """Keep `transformers`' remarks about new heads and its loading bars out of the progress display."""
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def quiet_libraries() -> None:
    """Leave the screen to progress bars and results: libraries' own chatter goes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_main():
        os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    for module in ("torch", "peft", "transformers", "accelerate"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")
