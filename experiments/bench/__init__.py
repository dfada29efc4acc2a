"""Speed and memory of the methods, measured apart from accuracy; `sparsegrad.benchmark` is the command."""
