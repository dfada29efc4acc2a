"""Fine-tune one model with one method on one task: `python run.py --help`."""

import os
import sys
from pathlib import Path

# Before torch is imported: threads that wait give up their core, so that two runs side by side do not slow each other
# down tenfold. A value of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import hydra
    from omegaconf import DictConfig

    from sparsegrad.cli import run_command
    from sparsegrad.cli.entry import start_run
except KeyboardInterrupt:  # importing torch takes a second or more
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)
except ModuleNotFoundError as error:
    from sparsegrad.extras import explain_missing

    if (text := explain_missing(error)) is None:
        raise
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several of the same process
        print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Hydra entry: compose, run, leave one record."""
    run_command(config, find_published)


def find_published(model: str, method: str, task: str) -> tuple[float, int] | None:
    """The paper's score in points and its table, from the files of the checkout; None where it has none."""
    try:
        from experiments.published import score_of  # here: it brings in pandas, an extra
    except ModuleNotFoundError:
        return None
    return score_of(model, method, task)


if __name__ == "__main__":
    sys.exit(start_run(main, Path(__file__).parent / "conf"))
