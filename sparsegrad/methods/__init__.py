"""Fine-tuning methods, one file each, behind the protocol `Method` of `base.py`."""
