"""Fine-tune one model with one method on one task: `python run.py --help`."""

import sys
from pathlib import Path

from sparsegrad import interrupt as interrupt  # first: Ctrl-C or a missing package below then ends in one line

# isort: split
import hydra
from omegaconf import DictConfig

from sparsegrad.cli import run_command
from sparsegrad.cli.entry import start_run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Hydra entry: compose, run, leave one record."""
    run_command(config, find_published)


def find_published(model: str, method: str, task: str, metric: str) -> tuple[float, int] | None:
    """The paper's score in points and its table, from the files of the checkout; None where it has none."""
    try:
        from experiments.published import score_of  # here: it brings in pandas, an extra
    except ModuleNotFoundError:
        return None
    return score_of(model, method, task, metric)


if __name__ == "__main__":
    sys.exit(start_run(main, Path(__file__).parent / "conf"))
