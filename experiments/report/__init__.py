"""Tables, figures and the report page, made from records: `python -m experiments.report`. Nothing is run."""
