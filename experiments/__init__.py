"""The paper's tables and figures: what each holds, the runs it needs, and what it shows beside the published values."""
