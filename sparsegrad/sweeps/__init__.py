"""Hyperparameter sweeps: a search space in YAML, an Optuna study that many workers share, and its results."""
