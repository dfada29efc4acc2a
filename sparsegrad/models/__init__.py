"""The model and tokenizer of a run: their source, loading them, and what of the model is trained."""
