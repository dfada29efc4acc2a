"""Speed and memory of the methods, measured apart from accuracy; `python -m experiments.bench` is the command."""
