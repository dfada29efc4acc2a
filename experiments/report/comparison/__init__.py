"""Table and figure of `make compare` from the runs on disk."""
