"""Hyperparameter sweeps: a search space in YAML, an Optuna study that many workers share, and its results.

`config.py` and `space.py` read the YAML, `worker.py` runs trials, and `show.py` prints and exports the results.
"""
