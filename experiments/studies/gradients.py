"""Measure what figures 2 and 3, the basis study and the energy table show, on MiniLM in training.

One JSON each in results/figures.

    python -m experiments.studies.gradients figure2 --data <glue folder> --block 3 --step 80
    python -m experiments.studies.gradients figure3 --data <glue folder>
    python -m experiments.studies.gradients basis --data <glue folder>
    python -m experiments.studies.gradients energy

Without --data the offline task snippets stands for SST-2. A minute or two each on one core; plots are made by
`python -m experiments.report`.
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
from experiments.studies.probe import Probe, compose_run, top_energy, variants
from sparsegrad.errors import UserError, check_integer
from sparsegrad.files import write_json
from sparsegrad.runs.config import RunConfig
from sparsegrad.runs.environment import describe_environment

DENSITIES = (0.001, 0.01, 0.1)
PIXELS = (72, 96)  # of a heat map
SETTINGS = ("model=minilm", "train.batch_size=16", "train.lr=1e-4", "seed=42", "train.device=cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake ends with one line and status 2."""
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
    parser.add_argument("--data", help="folder with GLUE; without it the offline snippets")
    parser.add_argument("--block", type=int, default=3, help="figure2, figure3: which block, from 0")
    parser.add_argument("--step", type=int, default=80, help="figure2: after how many training steps")
    parser.add_argument("--steps", type=int, default=120, help="figure3, basis, energy: training steps in all")
    parser.add_argument("overrides", nargs="*", help="as of run.py")
    return parser


def _config(options: argparse.Namespace) -> RunConfig:
    task = ["task=snippets"] if options.data is None else ["task=sst2", f"data.dir={options.data}"]
    rows = ["data.max_train=8000", "data.max_eval=100"]
    given = {one.partition("=")[0]: one for one in (*SETTINGS, *task, *rows, *options.overrides)}
    for name in ("step", "steps", "block"):
        check_integer(name, getattr(options, name), at_least=0)
    return compose_run(*given.values())


def _facts(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "schema": 1,
        "model": config.model.name,
        "task": config.task.name,
        "batch_size": config.train.batch_size,
        "lr": config.train.lr,
        "seed": config.seed,
        "trained_by": "SparseGrad, top 1 %, HOSVD of 30 calibration batches; the rest of the model trains too",
        "environment": describe_environment(torch.device("cpu")),
    }


def figure2(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Heat maps of the gradients of one block after some steps: untouched, rotated, in the authors' basis."""
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
    """dL/dY of one batch, padded and not, and its share of entries that are not zero over training."""
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
    """Energy in the largest entries of each block's gradient, for each basis, over training."""
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
    """Share of each block's squared gradient norm that the engines capture, over training."""
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
    """`steps` optimizer steps; `look` before the first, every `every`-th, and after the last."""
    batches = probe.batches(2)
    for step in range(steps + 1):
        if look is not None and (step % every == 0 or step == steps):
            look(step)
        if step < steps:
            probe.backward(next(batches))
            probe.optimizer.step()


def _view(matrix: Tensor) -> dict[str, Any]:
    """A heat map of magnitudes: the largest of each patch, as log10 of its share of the largest of all."""
    magnitudes = matrix.abs()
    pooled = functional.adaptive_max_pool2d(magnitudes[None, None], PIXELS)[0, 0]
    floor = magnitudes.max().item() * 1e-6
    levels = (pooled.clamp_min(floor) / magnitudes.max()).log10()
    return {
        "shape": list(matrix.shape),
        "top_1_percent": round(top_energy(matrix, 0.01), 4),
        "log10": [" ".join(f"{value:.1f}" for value in row) for row in levels.tolist()],
    }


def _share(dy: Tensor) -> float:
    return round((dy != 0).float().mean().item(), 5)


def _stripes(dy: Tensor, tokens: int = 512) -> dict[str, Any]:
    """Which of the first tokens have a gradient at all: the rows of the picture."""
    rows = (dy[:tokens] != 0).float().mean(1)
    return {"tokens": len(rows), "features": dy.shape[1], "row_share": [round(value, 3) for value in rows.tolist()]}


_MEASURES: dict[str, Callable[[RunConfig, argparse.Namespace], dict[str, Any]]] = {
    "figure2": figure2,
    "figure3": figure3,
    "basis": basis,
    "energy": energy,
}

if __name__ == "__main__":
    sys.exit(main())
