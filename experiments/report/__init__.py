"""Records to tables, figures and the report page: `python -m experiments.report`. Runs nothing."""
