"""Measure the data of figures 2 and 3, of the basis study and of the energy table, on MiniLM during training.

Each command writes one JSON to results/figures. `python -m experiments.report` draws the plots.

    python -m experiments.studies.gradients figure2 --data <glue folder> --block 3 --step 80
    python -m experiments.studies.gradients figure3 --data <glue folder>
    python -m experiments.studies.gradients basis --data <glue folder>
    python -m experiments.studies.gradients energy

Without --data, the offline task snippets replaces SST-2. Each command takes one or two minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from experiments.studies.captured import DENSITY, capture
from experiments.studies.probe import Probe, build_run, top_energy, variants
from sparsegrad.errors import UserError, check_integer, run_as_command
from sparsegrad.files import write_json
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.environment import describe_environment

DENSITIES = (0.001, 0.01, 0.1)
PIXELS = (72, 96)  # rows and columns of a heat map
SETTINGS = ("model=minilm", "train.batch_size=16", "train.lr=1e-4", "seed=42", "train.device=cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 2 and one line after bad input."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = _config(options)
        found = _MEASURES[options.what](config, options)
        path = Path(config.results_dir) / "figures" / f"{options.what}.json"
        write_json(path, {**_facts(config, options), **found})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.gradients", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", choices=list(_MEASURES))
    parser.add_argument("--data", help="folder with GLUE (default: the offline snippets)")
    parser.add_argument("--block", type=int, default=3, help="figure2, figure3: index of the block, from 0")
    parser.add_argument("--step", type=int, default=80, help="figure2: number of training steps before the measurement")
    parser.add_argument("--steps", type=int, default=120, help="figure3, basis, energy: total training steps")
    parser.add_argument("overrides", nargs="*", help="overrides as for run.py")
    return parser


def _config(options: argparse.Namespace) -> RunConfig:
    task = ["task=snippets"] if options.data is None else ["task=sst2", f"data.dir={options.data}"]
    rows = ["data.max_train=8000", "data.max_eval=100"]
    given = {one.partition("=")[0]: one for one in (*SETTINGS, *task, *rows, *options.overrides)}
    for name in ("step", "steps", "block"):
        check_integer(name, getattr(options, name), at_least=0)
    return build_run(*given.values())


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that these arguments of `main` ask for; a measurement stores them, if it uses them, but `steps`.

    Raises:
        UserError: for a value that is not allowed.
    """
    options = _parser().parse_intermixed_args(arguments)
    return {**_settings(_config(options)), **{key: getattr(options, key) for key in ("block", "step", "steps")}}


def _settings(config: RunConfig) -> dict[str, Any]:
    return {
        "model": config.model.name,
        "task": config.task.name,
        "batch_size": config.train.batch_size,
        "lr": config.train.lr,
        "seed": config.seed,
    }


def _facts(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "schema": 1,
        **_settings(config),
        "trained_by": "SparseGrad, top 1 %, HOSVD of 30 calibration batches; the rest of the model trains too",
        "environment": describe_environment(torch.device("cpu")),
    }


def figure2(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Heat maps of one block's gradients after some steps: unrotated, rotated, and in the authors' basis."""
    probe = Probe(config)
    blocks = len(next(iter(probe.linears.values())))
    check_integer("block", options.block, at_least=0, at_most=blocks - 1)
    _train(probe, options.step)
    probe.backward(next(probe.batches(3)))
    kinds = {}
    for kind, basis in probe.bases.items():
        G, named = probe.gradients(kind)[options.block], variants(basis)
        views = {"untouched": named["none"], "rotated": named["both"], "authors": named["authors"]}
        kinds[kind] = {name: _view(one.rotate(G)) for name, one in views.items()}
    return {"block": options.block, "step": options.step, "kinds": kinds}


def figure3(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """dL/dY of one batch with both kinds of padding, and its share of non-zero entries during training."""
    probe = Probe(config)
    check_integer("block", options.block, at_least=0, at_most=len(next(iter(probe.linears.values()))) - 1)
    shares: list[dict[str, Any]] = []
    pictures: dict[str, Any] = {}

    def look(step: int) -> None:
        for pad in ("max_length", "longest"):
            batch = next(probe.batches(100 + step, pad))
            found = probe.output_gradients(batch)
            tokens = batch["attention_mask"].float().mean().item()
            nonzero = {kind: [_share(dy) for dy in grads] for kind, grads in found.items()}
            shares.append({"step": step, "pad": pad, "real_tokens": round(tokens, 5), "nonzero": nonzero})
            if step == 0:
                pictures[pad] = {kind: _stripes(grads[options.block]) for kind, grads in found.items()}

    _train(probe, options.steps, every=4, look=look)
    return {"block": options.block, "pictures": pictures, "shares": shares}


def basis(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Energy in the largest entries of each block's gradient, for each basis, during training."""
    probe = Probe(config)
    named = {kind: variants(one, config.seed) for kind, one in probe.bases.items()}
    rows: list[dict[str, Any]] = []

    def look(step: int) -> None:
        probe.backward(next(probe.batches(100 + step)))
        for kind, of in named.items():
            for name, one in of.items():
                rotated = [one.rotate(G) for G in probe.gradients(kind)]
                for density in DENSITIES:
                    energies = [round(top_energy(G, density), 5) for G in rotated]
                    rows.append({"step": step, "kind": kind, "basis": name, "density": density, "blocks": energies})

    _train(probe, options.steps, every=20, look=look)
    return {"rows": rows}


def energy(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Share of each block's squared gradient norm that the engines capture, during training."""
    probe = Probe(config)
    rows: list[dict[str, Any]] = []

    def look(step: int) -> None:
        probe.backward(next(probe.batches(100 + step)))
        for kind, basis in probe.bases.items():
            for arm, shares in capture(probe.gradients(kind), basis).items():
                rows.append({"step": step, "kind": kind, "arm": arm, "blocks": shares})

    _train(probe, options.steps, every=20, look=look)
    return {"density": DENSITY, "rows": rows}


def _train(probe: Probe, steps: int, every: int = 1, look: Callable[[int], None] | None = None) -> None:
    """Train `steps` steps; call `look(step)` before every `every`-th step and after the last."""
    batches = probe.batches(2)  # stream 1 is calibration, 3 and 100 upwards are for measurements
    for step in range(steps + 1):
        if look is not None and (step % every == 0 or step == steps):
            look(step)
        if step < steps:
            probe.backward(next(batches))
            probe.optimizer.step()


def _view(matrix: Tensor) -> dict[str, Any]:
    """A heat map of magnitudes: log10 of the maximum of each patch, relative to the maximum of the matrix."""
    magnitudes = matrix.abs()
    pooled = functional.adaptive_max_pool2d(magnitudes[None, None], PIXELS)[0, 0]
    floor = magnitudes.max().item() * 1e-6  # log10 of zero would be -inf
    levels = (pooled.clamp_min(floor) / magnitudes.max()).log10()
    return {
        "shape": list(matrix.shape),
        "top_1_percent": round(top_energy(matrix, 0.01), 4),
        "log10": [" ".join(f"{value:.1f}" for value in row) for row in levels.tolist()],
    }


def _share(dy: Tensor) -> float:
    return round((dy != 0).float().mean().item(), 5)


def _stripes(dy: Tensor) -> dict[str, Any]:
    """Share of non-zero features of dL/dY (tokens, features) for each of the first 512 tokens."""
    rows = (dy[:512] != 0).float().mean(1)
    return {"tokens": len(rows), "features": dy.shape[1], "row_share": [round(value, 3) for value in rows.tolist()]}


_MEASURES: dict[str, Callable[[RunConfig, argparse.Namespace], dict[str, Any]]] = {
    "figure2": figure2,
    "figure3": figure3,
    "basis": basis,
    "energy": energy,
}

if __name__ == "__main__":
    sys.exit(run_as_command(main, "interrupted: the same command starts the measurement again"))
