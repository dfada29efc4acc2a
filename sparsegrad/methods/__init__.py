"""Fine-tuning methods: one file each, one small protocol (`base.py`)."""
