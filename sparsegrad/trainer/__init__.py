"""The Hugging Face Trainer with verified checkpoints and exact resume; independent of the configuration.

`trainer.py` has the class, and `checkpoints.py` verifies what it stores; `sparsegrad.runs.trainer_setup` configures it.
"""
