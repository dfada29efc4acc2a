"""Fine-tune one model with one method on one task: `python run.py --help`."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from sparsegrad.cli import run_command
from sparsegrad.runs.yaml_check import or_exit


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Hydra entry: compose, run, leave one record."""
    run_command(config)


if __name__ == "__main__":
    or_exit(Path(__file__).parent / "conf")
    main()
